"""The models under study: their sites, recording and patching."""
