"""How tasks are learned, in the order of the data flow.

    task distribution ──sample──▶ task batch ──adapt (eq. 2)──▶ θ'_i
        p(T), eq. 1                worker/        maml/            │ query loss (eq. 3), maml/
                                                                  ▼
    checkpoint ◀── outer update (eq. 4) ◀── aggregate ◀──── meta-gradient per chunk
    MLflow     ◀──┘    driver                driver            Ray actor, or in process

Tasks to act in have no batch to sample: the worker collects trajectories instead; everything after
that is the same. The driver (`training.loop`) waits for the slowest chunk of an iteration; workers
wait for the driver's next θ, and sample the next tasks meanwhile. Nobody waits for MLflow. A wing
imports only from those before it: config, maml, rl, worker, cluster, runs, evaluation, training,
search, cli.
"""
