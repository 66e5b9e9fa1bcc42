"""Commands that read finished runs: report, compare, compare-methods, zeroshot."""
