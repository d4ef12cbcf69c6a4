"""Watches a committed plan: `canary` keeps and scores calls, `drift` and `paces` detect change, `breaker` opens."""
