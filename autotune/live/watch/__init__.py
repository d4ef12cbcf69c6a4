"""Watches a committed plan: `canary` keeps and scores calls, `drift` detects change, `breaker` opens and closes."""
