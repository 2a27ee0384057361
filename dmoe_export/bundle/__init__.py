"""What a deployable folder is: manifest, verified reading, atomic writing (normative: docs/bundle.md). No torch."""
