"""Several derivatives inside one traced function: persistent and nested tapes, in every form, loop and layer.

The values are those of the plain formula in TensorFlow's own operations, eagerly and in float64.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import layers


def plain(x, y, bias):
    scores = tf.einsum("bqhd,bkhd->bhqk", x, y) / np.sqrt(x.shape[-1]) + bias
    return tf.einsum("bhqk,bkhd->bqhd", tf.nn.softmax(scores), y)


def fused(x, y, bias):
    return attn_ops.scaled_dot_product_attention(x, y, y, bias=bias, implementation="fused")


def inputs():
    random = np.random.default_rng(0)
    return [tf.constant(random.standard_normal(shape)) for shape in [(2, 3, 2, 4), (2, 5, 2, 4), (1, 2, 1, 5)]]


def two_losses(attend, *x):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        out = attend(*x)
        first, second = tf.reduce_sum(tf.sin(out)), tf.reduce_sum(out**3)
    return [*tape.gradient(first, x), *tape.gradient(second, x)]


def penalty(attend, *x):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = tf.reduce_sum(tf.sin(attend(*x)))
        norm = tf.add_n([tf.reduce_sum(g**2) for g in inner.gradient(loss, x)])
        total = loss + norm
    return outer.gradient(total, x)


def persistent_penalty(attend, *x):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.sin(attend(*x)))
        norm = tf.reduce_sum(tape.gradient(loss, x[0]) ** 2)
    return [*tape.gradient(norm, x), *tape.gradient(loss, x)]


def gathered(attend, *x):
    """The gradient of what is gathered comes as `tf.IndexedSlices`."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.sin(tf.gather(attend(*x), [1, 0, 1])))
    return tape.gradient(loss, x)


def maml(attend, x, y, bias):
    with tf.GradientTape() as outer:
        outer.watch([x, bias])
        fast = x
        for _ in range(2):
            with tf.GradientTape() as inner:
                inner.watch(fast)
                loss = tf.reduce_sum(attend(fast, y, bias) ** 2)
            fast -= 0.1 * inner.gradient(loss, fast)
        loss = tf.reduce_sum(tf.sin(attend(fast, y, bias)))
    return outer.gradient(loss, [x, bias])


def penalty_in_a_loop(attend, x, y, bias):
    def body(i, total, x):
        return i + 1, total + tf.add_n([tf.reduce_sum(g**2) for g in two_losses(attend, x, y, bias)]), x + 0.1

    with tf.GradientTape() as tape:
        tape.watch(x)
        _, total, _ = tf.while_loop(
            lambda i, *_: i < 2, body, (0, tf.zeros((), x.dtype), x), maximum_iterations=2
        )
    return [tape.gradient(total, x)]


def penalty_in_map_fn(attend, x, y, bias):
    return tf.map_fn(lambda one: penalty(attend, one[0][None], one[1][None], bias)[0][0], (x, y), x.dtype)


def recomputed(attend, *x):
    """First order: TensorFlow itself refuses the second."""
    return two_losses(tf.recompute_grad(attend), *x)


JOBS = (two_losses, penalty, persistent_penalty, gathered, maml, penalty_in_a_loop, penalty_in_map_fn, recomputed)


def eagerly(job, attend):
    return lambda *x: job(attend, *x)


def in_a_graph(job, attend):
    return tf.function(lambda *x: job(attend, *x), autograph=False)


def in_xla(job, attend):
    return tf.function(lambda *x: job(attend, *x), autograph=False, jit_compile=True)


def around_a_function(job, attend):
    function = tf.function(attend, autograph=False)
    return lambda *x: job(function, *x)


def around_a_compiled_function(job, attend):
    function = tf.function(attend, autograph=False, jit_compile=True)
    return tf.function(lambda *x: job(function, *x), autograph=False)


def compiled_around_a_graph(job, attend):
    graph = in_a_graph(job, attend)
    graph.get_concrete_function(*inputs())  # made before XLA has it
    return tf.function(lambda *x: graph(*x), autograph=False, jit_compile=True)


def around_a_branch(job, attend):
    def branches(*x):
        return tf.cond(tf.reduce_sum(x[0]) < 1e9, lambda: attend(*x), lambda: attend(x[0] * 2, *x[1:]))

    function = tf.function(branches, autograph=False)
    return lambda *x: job(function, *x)


def around_a_loop(job, attend):
    def once(*x):
        step = lambda i, y: (i + 1, attend(y, *x[1:]))  # noqa: E731
        return tf.while_loop(lambda i, _: i < tf.size(x[0]) // 48, step, (0, x[0]))[1]

    function = tf.function(once, autograph=False)
    return lambda *x: job(function, *x)


def assert_right(job, found):
    expected = job(plain, *inputs())
    for x, y in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.wide(4)
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
@pytest.mark.parametrize("form", [eagerly, in_a_graph, in_xla], ids=lambda form: form.__name__)
def test_in_one_place(form, job):
    assert_right(job, form(job, fused)(*inputs()))


@pytest.mark.wide(4)
@pytest.mark.parametrize(
    "form",
    [around_a_function, around_a_compiled_function, compiled_around_a_graph, around_a_branch, around_a_loop],
)
@pytest.mark.parametrize("job", [two_losses, penalty, persistent_penalty, gathered])
def test_across_functions(form, job):
    assert_right(job, form(job, fused)(*inputs()))


def stacked(attend):
    """Calls whose results and cotangents others use too."""

    def function(x, y, bias):
        first = attend(x, y, bias)
        return attend(first, tf.concat([y, first], 1), tf.concat([bias, bias[..., :3]], -1)) * first

    return function


@pytest.mark.parametrize("form", [around_a_function, around_a_compiled_function, compiled_around_a_graph])
def test_across_functions_of_several_calls(form):
    expected = persistent_penalty(stacked(plain), *inputs())
    for x, y in zip(form(persistent_penalty, stacked(fused))(*inputs()), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pfor", [False, True])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_batch_jacobian(jit_compile, pfor):
    x, y, bias = inputs()

    def jacobian(attend):
        with tf.GradientTape(persistent=not pfor) as tape:
            tape.watch(x)
            out = attend(x, y, bias)
        return tape.batch_jacobian(out, x, experimental_use_pfor=pfor)

    found = tf.function(lambda: jacobian(fused), jit_compile=jit_compile, autograph=False)()
    np.testing.assert_allclose(found, jacobian(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_hidden_keys_dropout_and_lse(jit_compile):
    """What only the composite can be asked about: the same function of the same bits."""
    x, y, bias = inputs()

    def second(implementation):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([x, y])
            out, lse = attn_ops.scaled_dot_product_attention(
                x, y, y, bias=bias, is_causal=True, key_value_seq_lengths=[3, 5], dropout_rate=0.4, dropout_seed=5,
                return_lse=True, implementation=implementation,
            )  # fmt: skip
            first = tape.gradient([out**2, lse], [x, y])
            norm = tf.add_n([tf.reduce_sum(g**2) for g in first])
        return [*first, *tape.gradient(norm, [x, y])]

    found = tf.function(lambda: second("fused"), jit_compile=jit_compile, autograph=False)()
    for a, b in zip(found, second("composite"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


LAYERS = {
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 4), lambda layer, x: layer(x, x)),
    "GroupedQueryAttention": (lambda: layers.GroupedQueryAttention(4, 4, 2), lambda layer, x: layer(x, x)),
    "Attention": (lambda: layers.Attention(use_scale=True), lambda layer, x: layer([x, x])),
    "AttentionLayer": (layers.AttentionLayer, lambda layer, x: layer([x, x, x])),
    "SelfAttention": (lambda: layers.SelfAttention(4), lambda layer, x: layer(x)),
}


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradient_penalty_of_a_layer(name, jit_compile):
    """Against the eager layer, whose gradients have tests of their own."""
    make, call = LAYERS[name]
    layer = make()
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 5, 8)), tf.float32)
    call(layer, x)

    def step(x):
        return penalty(lambda x: call(layer, x), x)[0]

    found = tf.function(step, jit_compile=jit_compile, autograph=False)(x)
    np.testing.assert_allclose(found, step(x), rtol=1e-3, atol=1e-4)


class Penalised(keras.Model):
    """Trains with a gradient penalty, and keeps one tape for both losses."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.head = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.head(self.attention(x, x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                predicted = self(x, training=True)
            loss = tf.reduce_mean((predicted - y) ** 2)
            norm = tf.reduce_mean(inner.gradient(predicted, x) ** 2)
        sources = self.trainable_variables
        pairs = zip(tape.gradient(loss, sources), tape.gradient(norm, sources))
        gradients = [a if b is None else a + 0.1 * b for a, b in pairs]
        self.optimizer.apply_gradients(zip(gradients, sources))
        return {"loss": loss, "norm": norm}


@functools.cache
def weights_after_fit(kind, jit_compile):
    random = np.random.default_rng(0)
    x, y = random.standard_normal((8, 5, 8)).astype("f4"), random.standard_normal((8, 5, 1)).astype("f4")
    keras.utils.set_random_seed(0)
    model = Penalised(kind(2, 4))
    model.compile(optimizer=keras.optimizers.SGD(0.1), jit_compile=jit_compile)
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, shuffle=False)
    return model.get_weights()


@pytest.mark.parametrize("jit_compile", [False, "auto", True])
def test_fit_with_a_gradient_penalty(jit_compile):
    expected = weights_after_fit(keras.layers.MultiHeadAttention, False)
    for stock, ours in zip(expected, weights_after_fit(layers.MultiHeadAttention, jit_compile), strict=True):
        np.testing.assert_allclose(ours, stock, rtol=1e-3, atol=1e-4)


def of_a_vectorized_map(attend, x, y, bias):
    return tf.vectorized_map(lambda one: attend(*(t[None] for t in one), bias)[0], (x, y))


def gradient_of_a_vectorized_map(attend, *x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.sin(of_a_vectorized_map(attend, *x)))
    return tape.gradient(loss, x)


def gradient_of_a_jacobian(attend, *x):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x[0])
            out = attend(*x)
        loss = tf.reduce_sum(tf.sin(inner.batch_jacobian(out, x[0])))
    return outer.gradient(loss, x)


def hessian(attend, *x):
    with tf.GradientTape() as outer:
        outer.watch(x[0])
        with tf.GradientTape() as inner:
            inner.watch(x[0])
            loss = tf.reduce_sum(tf.sin(attend(*x)))
        gradient = inner.gradient(loss, x[0])
    return outer.jacobian(gradient, x[0])


def composite(x, y, bias):
    return attn_ops.scaled_dot_product_attention(x, y, y, bias=bias, implementation="composite")


def chosen(x, y, bias):
    return attn_ops.scaled_dot_product_attention(x, y, y, bias=bias)


@pytest.mark.parametrize("job", [gradient_of_a_vectorized_map, gradient_of_a_jacobian])
@pytest.mark.parametrize("attend", [chosen, composite])
@pytest.mark.parametrize("form", [eagerly, in_a_graph], ids=lambda form: form.__name__)
def test_gradient_of_what_is_vectorized(form, attend, job):
    """TensorFlow forgets the gradients of `tf.custom_gradient` there, and takes those of what is inside."""
    assert_right(job, form(job, attend)(*inputs()))


@pytest.mark.parametrize("job", [of_a_vectorized_map, hessian, gradient_of_a_jacobian])
def test_what_is_vectorized_with_unknown_sizes(job):
    unknown = [tf.TensorSpec([None] * 4, tf.float64)] * 3
    assert_right(job, tf.function(lambda *x: job(chosen, *x), input_signature=unknown, autograph=False)(*inputs()))


@pytest.mark.parametrize("form, known", [(eagerly, True), (in_a_graph, False)])
def test_gradient_of_what_was_traced_before_and_is_vectorized(form, known):
    """The gradient that it was traced with is forgotten, and that of its operations counts: nothing may stop it."""
    specs = [tf.TensorSpec([1, *x.shape[1:]] if known else [None] * 4, tf.float64) for x in inputs()]
    before = tf.function(composite, input_signature=specs, autograph=False)
    before.get_concrete_function()
    assert_right(gradient_of_a_vectorized_map, form(gradient_of_a_vectorized_map, before)(*inputs()))


def test_forcing_the_kernels_where_their_gradient_is_lost():
    with pytest.raises(ValueError, match="by tf.vectorized_map or for a Jacobian, which loses the gradients"):
        tf.function(gradient_of_a_vectorized_map, autograph=False)(fused, *inputs())


def test_forward_mode_with_unknown_sizes():
    def derivative(attend, *x):
        with tf.autodiff.ForwardAccumulator(x, tuple(map(tf.cos, x))) as accumulator:
            out = attend(*x)
        return accumulator.jvp(out)

    unknown = [tf.TensorSpec([None] * 4, tf.float64)] * 3
    function = tf.function(lambda *x: derivative(chosen, *x), input_signature=unknown, autograph=False)
    assert_right(derivative, function(*inputs()))
