"""From records to a scaling law one can believe: frame, fits, comparisons, figures, report.

Reads record files only: neither torch nor the `suite` package is imported here.
"""
