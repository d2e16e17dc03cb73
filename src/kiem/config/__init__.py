"""Configuration: schema, presets and derived values, files and overrides. Works without torch."""
