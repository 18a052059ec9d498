"""
A pytest plugin, `-p no_old_names`: transformers as it will be once `past_key_values` is gone.

It must be loaded before transformers is: the decorators that still accept the old name are applied on import.
"""

import functools

from transformers.utils import deprecation, generic


OLD = {"past_key_values", "cache_params"}


def refuse(function):
    @functools.wraps(function)
    def strict(*args, **kwargs):
        if old := OLD & {name for name, value in kwargs.items() if value is not None}:
            raise TypeError(f"{function.__qualname__} got an unexpected keyword argument {old}")
        return function(*args, **kwargs)

    return strict


original = deprecation.deprecate_kwarg


def deprecate_kwarg(old_name, *args, **kwargs):
    return refuse if old_name in OLD else original(old_name, *args, **kwargs)


def refuse_names(kwargs):
    if old := OLD & set(kwargs):
        raise TypeError(f"an output got an unexpected keyword argument {old}")


deprecation.deprecate_kwarg = deprecate_kwarg
if hasattr(generic, "_rename_kwargs_for_bc"):  # of transformers 5.24
    generic._rename_kwargs_for_bc = refuse_names
    generic.ModelOutput._replace_old_cache_name = lambda self, key: key
    for name in OLD:
        delattr(generic.ModelOutput, name)
