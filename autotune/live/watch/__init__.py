"""Watches a committed plan: `canary` scores calls, `drift` and `paces` detect change, `service` takes it out."""
