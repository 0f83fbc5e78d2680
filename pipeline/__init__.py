"""How tasks are learned, in the order of the data flow.

    task distribution ──sample──▶ task batch ──adapt (eq. 2)──▶ θ'_i
        p(T), eq. 1                chunk.py      inner_loop.py    │ query loss (eq. 3), meta_loss.py
                                                                  ▼
    checkpoint ◀── outer update (eq. 4) ◀── aggregate ◀──── meta-gradient per chunk
    MLflow     ◀──┘    driver                driver            Ray actor, or in process

Tasks to act in have no batch to sample: `control` collects trajectories instead; everything after
that is the same. The driver (`training`) waits for the slowest chunk of an iteration; workers wait
for the driver's next θ, and sample the next tasks meanwhile. Nobody waits for MLflow. A file
imports only from those above it in this order: components, estimates, section, sections,
search_section, config, config_errors, algorithms, experiments, search_space, parameters, models,
meta_loss, update_rules, adaptation, inner_loop, compilation, meta_gradient, learning_curve,
diagnostics, representations, policies, advantages, policy_gradient, experience, natural_gradient,
domain, task_supply, supervised, control, programs, chunk, adapter, exported_model, workers,
chunk_actor, ray_cluster, ray_workers, placement, aggregation, outer_update, policy_update, health,
checkpoint, mlflow_sender, tracking, mlflow_ui, runs, evaluation, comparison, analysis, export,
figures, plots, control_plots, health_plots, analysis_report, report, run_folder, session,
pretraining, train_workers, training, search_trial, search_plots, search_report, search_runs,
search_tune, search, job_package, jobs, console, search_console, cli_errors, cli_data, cli_search,
cli_jobs, cli_results, cli_runs, cli.
"""
