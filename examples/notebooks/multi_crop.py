# %% [markdown]
# # MC-LLaVA: what the two knobs do
#
# `max_crops` limits the number of crops in addition to the whole picture, and `num_tokens` the number of visual tokens
# that all crops share. More crops show smaller things and take more time in the vision tower. More tokens take more
# room in the prompt.

# %%
# On Colab, install the package from the model's repository, without the 6.4 GB of weights in its root.
import importlib.util

from huggingface_hub import snapshot_download
from IPython import get_ipython


if importlib.util.find_spec("mc_llava") is None:
    folder = snapshot_download("visheratin/MC-LLaVA-3b", local_dir="MC-LLaVA", ignore_patterns=["model*.safetensors"])
    get_ipython().run_line_magic("pip", f"install --quiet {folder} matplotlib")

# %%
import json
import os
import random
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import display
from PIL import Image
from tqdm.auto import tqdm

from mc_llava import scenes
from mc_llava.crop_grid import draw_crop_grid
from mc_llava.engine import Engine, Reply, ask_about
from mc_llava.estimate import estimate
from mc_llava.folders import TINY
from mc_llava.loading import load_model, load_processor


# The bundled `tiny` reads signs and names small things, but cannot describe a picture. For that, use
# visheratin/MC-LLaVA-3b (6.4 GB).
MODEL = os.environ.get("MC_LLAVA_MODEL", "tiny")
NUM_SCENES = int(os.environ.get("NUM_SCENES", 40))
engine = Engine(load_model(MODEL), load_processor(MODEL), max_new_tokens=24)
MAX_CROPS = (0, 4, 16, 32)
MOST_TOKENS = engine.knobs["num_tokens"]
# What the first cell downloaded, or the clone that this notebook is in or that is installed in editable mode.
folders = Path("MC-LLaVA"), Path.cwd(), *Path.cwd().parents
FOLDER = next((folder for folder in folders if (folder / "examples" / "questions.json").is_file()), TINY.parent)


def ask(picture, question: str, **knobs) -> Reply:
    encoded = engine.encode([picture], **knobs)  # further questions about a picture don't encode it again
    (reply,) = engine.answer([ask_about(encoded, question)], do_sample=False)
    return reply


# %% [markdown]
# ## More and more crops of one picture
#
# The sign that the question is about is too small to be read in the whole picture.

# %%
examples = json.loads((FOLDER / "examples" / "questions.json").read_text())
example = next(example for example in examples if example["image"] == "cup.jpg")
picture, question = Image.open(FOLDER / "examples" / "cup.jpg"), example["question"]
print(f"{question} ({example['key']})")

figure, axes = plt.subplots(1, len(MAX_CROPS), figsize=(4 * len(MAX_CROPS), 4))
for axis, max_crops in zip(axes, MAX_CROPS):
    reply = ask(picture, question, max_crops=max_crops)
    axis.imshow(draw_crop_grid(picture, reply.images[0].plans[0]))
    axis.set_title(f"max_crops={max_crops}, {reply.crops} crops\n{reply.text}", fontsize=9)
    axis.axis("off")
    print(f"max_crops={max_crops}: {reply.text}")
plt.show()

# %% [markdown]
# ## Fewer tokens for the same crops

# %%
for num_tokens in (MOST_TOKENS // 4, MOST_TOKENS // 2, MOST_TOKENS):
    reply = ask(picture, question, num_tokens=num_tokens)
    share = reply.images[0].plans[0][0].num_tokens
    print(f"num_tokens={num_tokens}: {reply.crops} crops with {share} tokens or more: {reply.text}")

# %% [markdown]
# ## The study
#
# `mc-llava study` asked `tiny` 500 questions of each kind and drew this plot.

# %%
display(Image.open(FOLDER / "docs" / "study_crops.png"))

# %% [markdown]
# ## A small study
#
# One question of each kind per scene, about scenes that were not used in training: accuracy and cost.

# %%
shares = {kind: [] for kind in scenes.KINDS}
costs = []
with tqdm(total=len(MAX_CROPS) * len(scenes.KINDS) * NUM_SCENES, unit="question") as progress:
    for max_crops in MAX_CROPS:
        right = dict.fromkeys(scenes.KINDS, 0)
        flops = 0
        for seed in range(NUM_SCENES):
            scene = scenes.make_scene(seed, "test")
            picture = scenes.draw_scene(scene)
            for kind in scenes.KINDS:
                asked = scenes.ask(scene, kind, random.Random(seed))
                reply = ask(picture, asked.text, max_crops=max_crops)
                right[kind] += scenes.is_correct(asked.key, reply.text)
                progress.update()
            cost = estimate(engine.model.config, reply.crops, reply.image_tokens, new_tokens=12)
            flops += cost.tower_flops + cost.prefill_flops
        costs.append(flops / NUM_SCENES / 1e9)
        for kind in scenes.KINDS:
            shares[kind].append(right[kind] / NUM_SCENES)

# %%
figure, (quality, cost) = plt.subplots(1, 2, figsize=(11, 4))
for kind, values in shares.items():
    quality.plot(MAX_CROPS, values, marker="o", label=kind)
quality.set(xlabel="max_crops", ylabel="right answers", ylim=(0, 1), title=f"{NUM_SCENES} scenes")
quality.legend()
cost.plot(MAX_CROPS, costs, marker="o")
cost.set(xlabel="max_crops", ylabel="GFLOP", ylim=(0, None), title="vision tower and prefill of a question")
plt.show()
for max_crops, *values in zip(MAX_CROPS, *shares.values(), costs):
    *values, flops = values
    print(f"max_crops={max_crops}:", *(f"{k} {v:.0%}," for k, v in zip(shares, values)), f"{flops:,.1f} GFLOP")
