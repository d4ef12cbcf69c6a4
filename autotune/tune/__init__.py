"""From a model and a workload to a proven plan: propose, try, validate, commit.

run                             the frame: a kept plan replayed, or a search, a verdict, a report
search, compose, choose         what to try next; decides on values alone
trying, bench                   one candidate, from application to verdict; what is measured for it
refine                          layers that make a scheme fail, left wider
contributions, verdict          what each transform brings; the outcome in a sentence
policy, conditions              policies: what to optimise for, within which limits, what to try when
plan, fingerprint, store, codec what is kept, what it is valid for, where and how
references                      what the original said in exams, kept between runs
findings, record, advice        what was found, as a report's record, with what the user could change
supported, selfcheck            which models and releases can be tuned
rehearsal, probation            a try on a tiny model, and one in a child process
"""
