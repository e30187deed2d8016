"""Questions asked of a residual stream, one file per question."""
