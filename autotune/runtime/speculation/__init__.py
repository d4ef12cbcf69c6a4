"""Speculative decoding: `drafts` guess, `speculate` checks, `strides` are steps of several tokens, `pace` how many."""
