"""The engine: how all groups of an optimizer are updated together.

A step, in ten lines::

    rows = the hyperparameters of each group                         # engine.read_groups
    inputs = all parameters, gradients, states, in flat lists        # plan.StepInputs
    plan = the last one that still fits, or a new one                # plan.StepPlan, of placement.place_all
    for bucket in plan.buckets: bucket.send(rows)                    # addresses and rows, one copy
    norm, control = measure(plan.buckets)                            # grad_norm: NORM, FACTOR, SKIP; nobody waits
    for bucket in plan.buckets: bucket.compile(control)              # what fails, fails before anything changes
    run_stock(plan.leftovers)                                        # fallback: torch's own step
    rounds.run(bucket.update(control) for bucket in plan.buckets)    # triton/ or cpu/; ranks meet where they have to

Read in this order: ``rule`` (what an algorithm tells), ``bucket`` (the tensors of one launch), ``triton/elementwise``
and ``cpu/elementwise`` (how they are updated), ``placement`` (who updates a parameter), ``plan`` (what is compared each
step), ``engine`` (a step), ``step`` (what users see); ``parts`` for steps of some parameters alone.

Words:

- **walk**: how an update moves over its tensors: ``elementwise``, ``measured``, ``factored``, ``orthogonal``.
  Each backend has a class of buckets for it.
- **placement**: which bucket a parameter goes to, or why torch's own step updates it.
- **bucket**: the tensors that one launch, or one round of calls, updates: of one device, dtypes and variant.
- **variant**: the values of a group's settings that choose a kernel, such as AMSGrad.
- **row**: the hyperparameters of a tensor in one step, in the form that kernels and formulas take.
- **scalars**: states of one number a parameter: ``step``, and ``mu_product`` and others of some rules.
- **member**: a parameter of a bucket, with its gradient, states and scalars.
- **leftover**: a parameter that torch's own step updates.
- **control**: what a step found out about its gradients: norm, factor, and whether to skip.
- **present**: of a member, whether it has a gradient in the step at hand.
- **part**: some parameters of an optimizer, which step apart from the others, with plans of their own.
- **shard**: of a parameter, what lies in this process: the local tensor of a DTensor, else the parameter itself.
- **cut**: over which ranks the shards of a DTensor are spread.
- **round**: where all updates of a step wait for sums over the ranks that have shards of a tensor.
- **exchange**: where they wait for matrices, each of which one rank has put together, orthogonalized and cut again.
- **span**: scalars that are neighbours in memory, which are counted at once.
- **twin**: of a parameter on a GPU, a tensor on the host that is updated in its place, with states beside it.
- **transfer**: twins, gradients of which come and which leave together.
- **backend**: ``triton``, ``native`` (a CPU), or ``torch``.
"""
