"""One training run under Ray Train, from a dataset version to a registered model version.

`job` is the run as the driver sees it; `ray_group` the processes; `lessons` what they learn from and are
examined by; `loop` the steps with their checkpoints and numbers; `step` one optimisation step; `features`
the cached features of a frozen backbone.
"""
