"""Many runs: statistics, tables, figures, sweeps and studies, and the helpers of the notebooks."""
