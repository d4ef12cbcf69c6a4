"""A committed plan under watch: `canary` keeps and scores calls, `drift` tells change, `breaker` opens and closes."""
