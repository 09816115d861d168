"""Speed and accuracy of normcore beside its peers: `python -m benchmarks`. See README.md."""
