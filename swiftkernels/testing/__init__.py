"""What tests, benchmarks and code outside this library share. Layers run without it.

* `tolerance`: how wrong a result may be, judged against float64.
* `cases`: inputs for the operators of additive attention.
* `timing`, `costs`: time, memory and FLOPs of a call.
* `harness`: verifies and times engines on one problem. `engines` is their table, `ratios` and
  `plots` show the results, `peers` are other attentions.
* `triton_trace`: counts and checks the memory accesses of any Triton kernel, in the interpreter
  (`interpreter` has the hooks).
"""
