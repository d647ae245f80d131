"""What makes a Keras layer one of ours: `flash_attention`, its signature and documentation, rematerialisation, and for
drop-in layers the switch to Keras's own answers and files of quantized projections."""

from __future__ import annotations

import inspect
import math
import numbers

import keras
from keras import tree

from attn_ops.call.options import is_integer
from attn_ops.layers.backend import backend

_IMPLEMENTATIONS = {None: None, True: "fused", False: "composite"}
_KEYWORD = inspect.Parameter.KEYWORD_ONLY

# Keras before 3.10 leaves the scores of a row without keys, which its softmax layer made, as they are: not 0.
EMPTY_SCORES_ARE_UNIFORM = tuple(int(part) for part in keras.__version__.split(".")[:2]) < (3, 10)
_DENSE_AS_IN_KERAS = "as_in_keras=True, and this Keras spreads the scores of a row without keys over all of them"


class _OfTheClass:
    """An attribute that instances do not have: the signature of a layer is that of its call, by which `tf.function(layer)`
    passes arguments on."""

    def __init__(self, value):
        self._value = value

    def __get__(self, instance, owner):
        if instance is None:
            return self._value
        raise AttributeError(f"{owner.__name__!r} object has no such attribute")


class FlashAttention:
    """Mixin that reads `flash_attention` before the stock constructor does, and means it.

    `None` runs the fused op wherever it can and the composite elsewhere; `True` runs the fused op or raises ValueError
    with every reason why it cannot, with dropout and with scores too; `False` runs the composite. As in Keras, a layer
    made with `None` after `keras.config.disable_flash_attention()` behaves as with `False`: the switch is read by the
    constructor, since it is a setting of the thread and a replica may call the layer on another one.

    The argument is saved in the config only when it was given, so that the configs of the stock layers stay theirs.
    """

    # The defaults of a stock layer whose class was changed to ours (`attn_ops.convert`).
    flash_attention = None
    _flash_attention = None
    # The arguments of the constructor that are ours, and their defaults.
    _OWN = {"flash_attention": None}
    # Those that must be positive integers, where the stock constructor does not look.
    _SIZES = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, keras.layers.Layer):
            cls.__signature__ = _OfTheClass(_signature(cls))

    def __init__(self, *args, flash_attention=None, **kwargs):
        given = _given(super().__init__, args, kwargs)
        if "flash_attention" in given:  # by position: Keras's own place for it
            place = list(given).index("flash_attention")
            flash_attention, args = args[place], (*args[:place], None, *args[place + 1 :])
        if "dropout" in given:
            checked_dropout(type(self).__name__, given["dropout"])
        for what in self._SIZES:
            if what in given:
                checked_size(type(self).__name__, what, given[what])
        if flash_attention not in (None, True, False):
            raise ValueError(
                f"{type(self).__name__}: flash_attention must be None, True or False, not {flash_attention!r}"
            )
        super().__init__(*args, **kwargs)
        self.flash_attention = flash_attention
        enabled = keras.config.is_flash_attention_enabled()  # None or False
        self._flash_attention = enabled if flash_attention is None else flash_attention

    @property
    def implementation(self):
        """What the layer asks of :func:`attn_ops.scaled_dot_product_attention`: None (automatic), "fused" or
        "composite"."""
        return _IMPLEMENTATIONS[self._flash_attention]

    def get_config(self):
        config = super().get_config()
        if self.flash_attention is not None:
            config["flash_attention"] = self.flash_attention
        return config

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Keras's, for graphs as well: TensorFlow rematerialises there only functions without arguments by keyword, and
        gives those no gradient anywhere. So this hands it one function of the floating tensors alone, dense ones."""
        for layer in self._flatten_layers(include_self=False):
            layer._remat_mode = None  # part of the region of this layer

        def call(*args, **kwargs):
            flat = tree.flatten((args, kwargs))
            where = [i for i, x in enumerate(flat) if _is_floating_tensor(x)]
            like = None  # the result, parts of which may be ragged

            def function_of_tensors(*tensors):
                nonlocal like
                given = {i: backend.with_values(flat[i], x) for i, x in zip(where, tensors)}
                given = [given.get(i, x) for i, x in enumerate(flat)]
                given_args, given_kwargs = tree.pack_sequence_as((args, kwargs), given)
                like = layer_call(*given_args, **given_kwargs)
                return tree.map_structure(backend.values, like)

            function = super(FlashAttention, self).rematerialized_call(function_of_tensors, *args, **kwargs)
            values = function(*(backend.values(flat[i]) for i in where))
            return tree.map_structure(backend.with_values, like, values)

        return call


class DropIn(FlashAttention):
    """Mixin of the layers that stand in for a stock one, whose class follows this one among their bases.

    `as_in_keras=True`, which `attn_ops.convert` sets, gives Keras's own answers where ours differ on purpose about
    masks: rows without keys get what the installed Keras gives them, and the caller's tensors keep or lose their masks
    as there.
    """

    as_in_keras = False
    _OWN = {**FlashAttention._OWN, "as_in_keras": False}
    _PROJECTIONS = ("_query_dense", "_key_dense", "_gate_dense", "_value_dense", "_output_dense")

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        stock = cls.__bases__[-1]
        is_stock = issubclass(stock, keras.layers.Layer) and not issubclass(stock, DropIn)
        if is_stock and cls.__doc__ and stock.__doc__:
            ours, theirs = inspect.cleandoc(cls.__doc__), inspect.cleandoc(stock.__doc__)  # Python 3.13 does so itself
            arguments = theirs[theirs.find("Args:") :]
            cls.__doc__ = f"{ours}\n\nWhat follows is of `keras.layers.{stock.__name__}`.\n\n{arguments}\n"

    def __init__(self, *args, as_in_keras=False, **kwargs):
        if as_in_keras not in (True, False):
            raise ValueError(f"{type(self).__name__}: as_in_keras must be True or False, not {as_in_keras!r}")
        super().__init__(*args, **kwargs)
        self.as_in_keras = as_in_keras

    def get_config(self):
        config = super().get_config()
        if self.as_in_keras:
            config["as_in_keras"] = True
        return config

    def beyond_stock(self, **given):
        """The names of what is in effect that stock layers do not have: options, and arguments ``given`` to a call."""
        return [what for what, x in given.items() if x is not None]

    def _refuse_ragged_in_keras(self, reason):
        """ValueError where a call with ragged tensors would have to run Keras's code, for this ``reason``, or None."""
        if reason:
            name = type(self).__name__
            raise ValueError(f"{name}: Keras's own code has no ragged tensors, and runs here: {reason}")

    def _refuse_beyond_stock(self, reason, **given):
        """ValueError where this call needs what Keras's code, which runs for this ``reason``, does not have."""
        beyond = self.beyond_stock(**given)
        if beyond:
            raise ValueError(
                f"{type(self).__name__}: Keras's own code has no {', '.join(beyond)}, and runs here: {reason}"
            )

    # Keras quantizes the projections, which are layers of their own, but saves only the policy of this one: a model
    # that is loaded would have float projections and find int8 weights. What a policy does not tell (which products are
    # rounded, the size of blocks) is in the configuration of the quantization, of which newer releases have one. A map of
    # policies is that of this layer, saved whole; Keras cannot compare two maps.

    def get_build_config(self):
        config = super().get_build_config()
        if not config:
            return config
        quantized = {
            name: projection
            for name, projection in self._projections().items()
            if projection.quantization_mode is not None
            and not isinstance(projection.dtype_policy, keras.dtype_policies.DTypePolicyMap)
            and projection.dtype_policy != self.dtype_policy
        }
        policies = {name: keras.dtype_policies.serialize(x.dtype_policy) for name, x in quantized.items()}
        given = {name: getattr(x, "quantization_config", None) for name, x in quantized.items()}
        given = {name: keras.saving.serialize_keras_object(x) for name, x in given.items() if x is not None}
        own = {"projections": policies, "quantization": given}
        return {**config, **{what: x for what, x in own.items() if x}}

    def build_from_config(self, config):
        super().build_from_config(config)
        config, projections = config or {}, self._projections()
        given = config.get("quantization", {})
        for name, policy in config.get("projections", {}).items():
            policy = keras.dtype_policies.deserialize(policy)
            if name in given:
                quantization = keras.saving.deserialize_keras_object(given[name])
                projections[name].quantize(policy.quantization_mode, config=quantization)
            projections[name].dtype_policy = policy  # quantizes what is not

    def _projections(self):
        found = {name: getattr(self, name, None) for name in self._PROJECTIONS}
        return {name: layer for name, layer in found.items() if layer is not None}


def overridden(layer, cls, *names):
    """The first of these methods of ``cls`` that the class of ``layer`` has another one of, or ``layer`` itself; or None."""
    for name in names:
        if getattr(type(layer), name, None) is not getattr(cls, name, None):
            return name
    return replaced_in(layer, *(name for name in names if name != "call"))  # which calls ours, with the same arguments


def replaced_in(layer, *names):
    """The first of these methods that somebody has put another one of into this very layer, or None. What attn_ops itself
    puts there has the attribute `put_by_attn_ops`."""
    own = vars(layer)
    return next((name for name in names if name in own and not hasattr(own[name], "put_by_attn_ops")), None)


def dense_reason(layer, cls, *steps):
    """Why Keras's own code needs what `layer`, a ``cls``, computes with: a subclass has one of these `steps`, or None."""
    step = overridden(layer, cls, *steps)
    if step:
        return f"{type(layer).__name__} overrides {step}()"
    return _DENSE_AS_IN_KERAS if layer.as_in_keras and EMPTY_SCORES_ARE_UNIFORM else None


def refuse_if_forced(layer, reason):
    """Raises ValueError where `layer` must run fused and, for this `reason`, runs Keras's code."""
    if layer.implementation == "fused":
        raise ValueError(f"{type(layer).__name__}(flash_attention=True) cannot run fused: {reason}")


def checked_units(name, units):
    """``units`` as a positive int, or None."""
    return None if units is None else checked_size(name, "units", units, "None or ")


def checked_size(name, what, size, other=""):
    """``size`` as a positive int."""
    if not is_integer(size) or size <= 0:
        raise ValueError(f"{name}: {what} must be {other}a positive integer, got {size!r}")
    return int(size)


def checked_dropout(name, rate):
    """``rate`` as a float in [0, 1)."""
    rate = checked_number(name, "dropout", rate)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name}: dropout must be in [0, 1), got {rate}")
    return rate


def checked_number(name, what, value):
    """``value`` as a finite float."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: {what} must be a number, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {what} must be finite, got {value}")
    return float(value)


def _given(constructor, args, kwargs):
    """The arguments that a call of ``constructor`` gives, by name; none where it does not fit, which is its affair."""
    try:
        return inspect.signature(constructor).bind(*args, **kwargs).arguments
    except TypeError:
        return {}


def _signature(cls):
    """The constructor's, which the mixins hide: that of the first class that is none of them, and our arguments."""
    own = dict(cls._OWN)
    for base in cls.__mro__:
        if "__init__" in vars(base) and "_OWN" not in vars(base):
            break
    signature = inspect.signature(base.__init__)
    _, *parameters = signature.parameters.values()
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return signature.replace(parameters=parameters)
    given = {parameter.name for parameter in parameters}
    added = [inspect.Parameter(name, _KEYWORD, default=default) for name, default in own.items() if name not in given]
    return signature.replace(parameters=[*parameters[:-1], *added, parameters[-1]])


def _is_floating_tensor(x):
    return keras.ops.is_tensor(x) and "float" in keras.backend.standardize_dtype(x.dtype)
