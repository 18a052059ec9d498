# %% [markdown]
# # MC-LLaVA: load, ask, look at the crops
#
# The model reads the whole picture and a grid of overlapping crops, and keeps a few tokens of each.

# %%
# On Colab, install the package from the model's repository, without the 6.4 GB of weights in its root.
import importlib.util

from huggingface_hub import snapshot_download
from IPython import get_ipython


if importlib.util.find_spec("mc_llava") is None:
    folder = snapshot_download("visheratin/MC-LLaVA-3b", local_dir="MC-LLaVA", ignore_patterns=["model*.safetensors"])
    get_ipython().run_line_magic("pip", f"install --quiet {folder}")

# %%
import os

from IPython.display import display

from mc_llava import scenes
from mc_llava.crop_grid import draw_crop_grid
from mc_llava.loading import load_model, load_processor


# The bundled `tiny` knows only drawn scenes. For photographs, use visheratin/MC-LLaVA-3b (6.4 GB).
MODEL = os.environ.get("MC_LLAVA_MODEL", "tiny")
model, processor = load_model(MODEL), load_processor(MODEL)  # on a GPU if there is one

# %% [markdown]
# ## Ask
#
# The picture is a drawn scene with small signs. The question has one right answer.

# %%
SCENE = 1054  # any number: no scene of this split was used in training
scene = scenes.make_scene(SCENE, "test")
picture = scenes.draw_scene(scene)
question = scenes.benchmark_question(SCENE, "ocr")
display(picture)

messages = [
    {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]}
]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True).to(
    model.device
)
output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
reply = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print("Question:", question.text)
print("Answer:", reply)
print("Right:", scenes.is_correct(question.key, reply), f"({question.key})")

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
# ## Ask again
#
# The vision tower takes most of the time. `encode_images` runs it once, and further questions reuse its outputs.

# %%
encoded = model.encode_images(**inputs)
for kind in ("attribute", "position"):
    further = scenes.benchmark_question(SCENE, kind)
    content = [{"type": "image"}, {"type": "text", "text": further.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    short = processor.tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**short, image_features=encoded, max_new_tokens=24, do_sample=False)
    print(further.text, processor.decode(output[0, short["input_ids"].shape[1] :], skip_special_tokens=True))
