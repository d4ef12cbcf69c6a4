"""From a model and a workload to a proven plan: propose, try, validate, commit.

run                             the whole of tuning: replay a kept plan, or search, conclude and report
search, compose, choose         decide what to try next, from values alone
trying, bench                   take one candidate from application to verdict; measure what that needs
refine                          finds the layers that make a scheme fail, and leaves them wider
contributions, verdict          what each transform contributes; the outcome in a sentence
policy, conditions              policies: what to optimise for, within which limits, what to try when
plan, fingerprint, store, codec plans: the values, what they are valid for, the files, the JSON
references                      the original's exam answers, kept between runs
findings, record, advice        what was found, as a report's record, and what the user could change
supported, selfcheck            which models and releases can be tuned
rehearsal, probation            try a transform on a tiny model, and in a child process
"""
