"""Side-by-side measurements; every script writes a dated JSON and a Markdown table into benchmarks/results/."""
