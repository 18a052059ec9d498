"""
transformers as it will be once `past_key_values` and other old names are gone, while `refused` is set.

This must be imported before transformers is: it wraps the decorators that still accept the old names.
"""

import functools

from transformers.utils import deprecation, generic


DEPRECATE = deprecation.deprecate_kwarg
RENAME = getattr(generic, "_rename_kwargs_for_bc", None)  # of transformers 5.24
REPLACE = getattr(generic.ModelOutput, "_replace_old_cache_name", None)
OLD = {"past_key_values", "cache_params"}
refused = False


def check(owner: str, names):
    if refused and (old := OLD & set(names)):
        raise TypeError(f"{owner} got an unexpected keyword argument {old}")


def deprecate_kwarg(old_name, *args, **kwargs):
    decorate = DEPRECATE(old_name, *args, **kwargs)
    if old_name not in OLD:
        return decorate

    def wrap(function):
        lenient = decorate(function)

        @functools.wraps(function)
        def checked(*args, **kwargs):
            check(function.__qualname__, [name for name, value in kwargs.items() if value is not None])
            return (function if refused else lenient)(*args, **kwargs)

        return checked

    return wrap


def rename_kwargs(kwargs):
    check("an output", kwargs)
    return RENAME(kwargs)


def old_attribute(name: str):
    original = vars(generic.ModelOutput)[name]

    def get(output):
        if refused:
            raise AttributeError(f"an output has no attribute {name}")
        return original.__get__(output)

    return property(get, original.fset)


def replace_old_name(output, key):
    return key if refused else REPLACE(output, key)


deprecation.deprecate_kwarg = deprecate_kwarg
if RENAME:
    generic._rename_kwargs_for_bc = rename_kwargs
    generic.ModelOutput._replace_old_cache_name = replace_old_name
    for name in OLD:
        setattr(generic.ModelOutput, name, old_attribute(name))
