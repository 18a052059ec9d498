"""
Run a model on a benchmark: batched replies, option likelihoods, resumable results, comparison of two runs.

    tasks.py             the benchmarks: where their data is, their prompts, how a reply is scored
    metrics.py           the scores as the benchmarks' own scripts compute them, intervals and tests
    running.py           puts a task's questions to an engine and writes the results file
    results.py           the contents of that file, and the table of its scores
    comparison.py        two results files side by side
    lmms_eval_model.py   the model in lmms-eval

Only `running` and `lmms_eval_model` need torch.
"""

# The names of `tasks.TASKS`, for help texts that load nothing.
TASK_NAMES = ("textvqa", "gqa", "vqav2", "vizwiz", "vstar", "scenes", "scenes70", "scenes140", "large", "photographs")
