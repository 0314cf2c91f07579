"""What a step, a transfer and a request cost on measured hardware. No torch; scipy only where something is fitted.

`analytical` is the model we route with, `measurements` what it is fitted to, `fit` how, `profile` all of it in a JSON file,
`presets` such files and how one is made of recorded benchmarks. `seed` is the earlier system's formula, for comparison.
"""
