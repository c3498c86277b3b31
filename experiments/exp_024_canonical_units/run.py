"""exp_024: are there canonical units: the same in every seed, at every size, by every method?

python experiments/exp_024_canonical_units/run.py
python experiments/exp_024_canonical_units/run.py +scale=smoke   # seconds

All dictionaries are trained on the same rows in the same order: only their first weights, their size and their kind differ.
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_024_canonical_units", trains=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    import pandas

    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.checkpoint import write_text
    from nndecomp.report import canonical, canonical_figures, style, tables

    settings = build.canonical_settings(cfg)
    instances = build.instances(cfg)
    target = build.target(cfg)
    components = build.component_instances(cfg, target)
    by_name = build.trained(cfg, target, out, {each.name: member for each, member in instances.items()})
    trained = {each: by_name[each.name] for each in instances}
    starts = build.starts(cfg, target, instances)
    units = build.units(cfg, target, {**trained, **starts, **build.baseline_instances(cfg, target), **components})
    found = build.compared_units(cfg, units)

    lines = canonical.raw(found, settings.found)
    write_text(out / "comparisons.csv", tables.comma_separated(pandas.DataFrame(lines)))
    report = [
        canonical.found_table(lines, settings.found),
        canonical.split_table(lines),
        canonical.method_table(lines, settings.found, settings.linked),
    ]
    write_text(out / "tables.md", "\n".join(map(tables.markdown, report)))
    print(*map(tables.terminal, report), sep="\n\n")

    colours = build.method_architectures(cfg, units)
    drawn = {
        "found_again": canonical_figures.found_again(lines, colours, settings.found),
        "children": canonical_figures.children(found, colours),
        "between": canonical_figures.between(lines, settings.found),
        "links": canonical_figures.degrees(found, [each for each in colours if each.startswith("spd")]),
    }
    for name, figure in drawn.items():
        if figure is not None:
            style.save(figure, out / "figures", name)
    return canonical.scores(lines) | canonical.everywhere(found, settings.found)


if __name__ == "__main__":
    main()
