"""The benchmark of the ops, `memformer-kernels bench`: what runs, against what, and how it is timed.

`suite` and `ops.toml` say what is measured and the work it cannot do without, `peers` and `flash_lse` what it is held
against, `inputs` the calls and their float64 answers. `runner` goes through the suite, `measure` checks and times one
implementation by way of `timing`; `targets`, `report` and `plots` say what came out.

Files of figures, of this and of other benchmarks, are told apart by `results`; `compare` holds two against each other,
and `page` shows a folder of them.
"""
