"""From rows to tables and figures: pure, and the only place that draws."""
