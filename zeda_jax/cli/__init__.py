"""The `zeda` command: one short file per group of subcommands."""
