# %% [markdown]
# # MC-LLaVA: load, ask, look at the crops
#
# The model reads the whole picture and overlapping crops, in a grid or where the question points, and keeps a few
# tokens of each.

# %%
# On Colab, install the package from the model's repository, without the 6.4 GB of weights in its root.
import importlib.util

from huggingface_hub import snapshot_download
from IPython import get_ipython


if importlib.util.find_spec("mc_llava") is None:
    folder = snapshot_download("visheratin/MC-LLaVA-3b", local_dir="MC-LLaVA", ignore_patterns=["model*.safetensors"])
    get_ipython().run_line_magic("pip", f"install --quiet {folder}")

# %%
import json
import os
from pathlib import Path

from IPython.display import display
from PIL import Image

from mc_llava import scenes
from mc_llava.crop_grid import draw_crop_grid, draw_looks
from mc_llava.folders import TINY
from mc_llava.loading import load_model, load_processor


# The bundled `tiny` reads signs and names small things, but cannot describe a picture. For that, use
# visheratin/MC-LLaVA-3b (6.4 GB).
MODEL = os.environ.get("MC_LLAVA_MODEL", "tiny")
model, processor = load_model(MODEL), load_processor(MODEL)  # on a GPU if there is one

# %% [markdown]
# ## Ask
#
# The picture is a photograph with small signs and things drawn into it. Each question about it has one right answer.

# %%
# What the first cell downloaded, or the clone that this notebook is in or that is installed in editable mode.
folders = Path("MC-LLaVA"), Path.cwd(), *Path.cwd().parents
FOLDER = next((folder for folder in folders if (folder / "examples" / "questions.json").is_file()), TINY.parent)
examples = json.loads((FOLDER / "examples" / "questions.json").read_text())
examples = [example for example in examples if example["image"] == "cup.jpg"]
question, key = examples[0]["question"], examples[0]["key"]
picture = Image.open(FOLDER / "examples" / "cup.jpg")
display(picture)


def prepare(**knobs):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs=knobs,
    ).to(model.device)


def reply(inputs, **options) -> str:
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, **options)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


inputs = prepare()
answer = reply(inputs)
print("Question:", question)
print("Without crops:", reply(prepare(max_crops=0)))
print("Answer:", answer)
print("Right:", scenes.is_correct(key, answer), f"({key})")

# %% [markdown]
# ## Look at the crops
#
# `max_crops` limits the number of crops in addition to the whole picture, and `num_tokens` the number of visual tokens
# that all crops share.

# %%
plan = processor.image_processor.plan(*picture.size)
print(f"{len(plan)} crops with {sum(crop.num_tokens for crop in plan)} tokens")
draw_crop_grid(picture, plan)

# %% [markdown]
# ## Look where the question points
#
# With `zoom`, a few crops scout the picture (thin frames), and others look closer at what the question needs (bold
# ones).

# %%
zoomed = prepare(zoom=2, max_crops=18)
looked = model.zoom(**zoomed)
text = {name: zoomed[name] for name in ("input_ids", "attention_mask")}
print("With zoom:", reply(text, image_features=looked))
draw_looks(picture, looked)

# %% [markdown]
# ## Ask again
#
# The vision tower takes most of the time. `encode_images` runs it once, and further questions reuse its outputs.

# %%
encoded = model.encode_images(**inputs)
for example in examples[1:]:
    content = [{"type": "image"}, {"type": "text", "text": example["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    further = processor.tokenizer(prompt, return_tensors="pt").to(model.device)
    print(example["question"], reply(further, image_features=encoded))
