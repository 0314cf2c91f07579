"""One module of checks a chapter, loaded by `nanopd.check` when first asked for."""
