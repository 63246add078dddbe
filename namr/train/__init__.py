"""One training run under Ray Train, from a dataset version to a registered model version.

`job` trains and registers it, as the driver sees it, and `run` is what it is: its configuration and what is
stored of it. `ray_group` is the processes; in each of them `loop` does the steps with examinations and
checkpoints between them, `step` one of the steps by a `recipe`; `dry_run` says what all that will take.
`training_data` has the batches and the classes to be examined on, `features` what a frozen backbone makes of
images; `examination` is what a checkpoint is worth, and `diary` tells MLflow.
"""
