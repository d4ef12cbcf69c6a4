"""Speculative decoding: `drafts` guess, `pace` decides how many, `speculate` checks, `strides` run several tokens."""
