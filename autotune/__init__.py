"""autotune makes a live Hugging Face causal LM faster without making it worse, and proves both.

Read in this order:

    wrap -> route -> variant        the model object, its interception, copy-on-write variants
    workload, hardware              what it is asked to do, and what the machine can do
    profile -> roofline -> diagnose what each phase costs, and what limits it
    policy -> transforms            what to try when
    validate                        quality first, then paired latency
    tune                            the loop: profile, diagnose, propose, try, validate, commit
    plan, report                    what is kept, and what is shown
"""
