"""What `python -m quill` says."""

raise SystemExit(
    "quill is a library: run train.py, sample.py or prepare.py, or one of its commands, python -m "
    "quill.plot, .bench, .export, .evaluate, .arithmetic, .reference, .scaling, .serve, .rl, "
    ".pairs, .reward, .dpo; --help of each lists its options"
)
