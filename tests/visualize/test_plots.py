"""Pictures by matplotlib: what is drawn, for every accepted shape, and what is refused."""

import builtins

import numpy as np
import pytest

from attn_ops import masks, visualize
from attn_ops.visualize import plot_attention_weights, plot_mask

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def softmax_weights(*shape):
    weights = np.random.default_rng(0).random(shape)
    return weights / weights.sum(-1, keepdims=True)


def drawn(figure):
    """The matrices of all heat maps, in panel order (the colour bar has no image)."""
    return [np.ma.filled(image.get_array(), np.nan) for ax in figure.axes for image in ax.get_images()]


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_matrix_is_one_panel():
    weights = softmax_weights(5, 7)
    figure = plot_attention_weights(weights)
    (panel,) = drawn(figure)
    np.testing.assert_array_equal(panel, weights)
    assert figure.axes[0].get_xlabel() == "key" and figure.axes[0].get_ylabel() == "query"


@pytest.mark.parametrize("example", [0, 2, -1])
def test_rank_3_draws_one_example(example):
    weights = softmax_weights(3, 5, 7)
    (panel,) = drawn(plot_attention_weights(weights, example=example))
    np.testing.assert_array_equal(panel, weights[example])


@pytest.mark.parametrize("num_heads, grid", [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (6, (2, 3)), (12, (3, 4))])
def test_rank_4_draws_a_grid_of_heads(num_heads, grid):
    weights = softmax_weights(2, num_heads, 3, 3)
    figure = plot_attention_weights(weights, example=1)
    panels = drawn(figure)
    assert len(panels) == num_heads
    for head, panel in enumerate(panels):
        np.testing.assert_array_equal(panel, weights[1, head])
        assert figure.axes[head].get_title() == f"head {head}"
    assert figure.axes[0].get_gridspec().get_geometry() == grid


def test_chosen_heads_in_the_given_order():
    weights = softmax_weights(1, 4, 3, 3)
    figure = plot_attention_weights(weights, heads=[3, 1])
    for panel, head in zip(drawn(figure), (3, 1), strict=True):
        np.testing.assert_array_equal(panel, weights[0, head])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["head 3", "head 1"]


def test_one_colour_scale_for_all_heads():
    weights = np.stack([np.full((2, 2), 0.5), np.eye(2)])[None]
    figure = plot_attention_weights(weights)
    assert {ax.get_images()[0].get_clim() for ax in figure.axes[:2]} == {(0.0, 1.0)}


def test_token_labels():
    figure = plot_attention_weights(softmax_weights(2, 3), ["a", "b"], ["x", "y", 3])
    assert tick_labels(figure.axes[0].yaxis) == ["a", "b"]
    assert tick_labels(figure.axes[0].xaxis) == ["x", "y", "3"]


def test_self_attention_labels_both_sides_with_the_query_tokens():
    figure = plot_attention_weights(softmax_weights(2, 2), ["a", "b"])
    assert tick_labels(figure.axes[0].xaxis) == ["a", "b"]


def test_many_labels_are_thinned_but_stay_at_their_positions():
    figure = plot_attention_weights(softmax_weights(300, 300), [f"t{i}" for i in range(300)])
    axis = figure.axes[0].xaxis
    assert len(axis.get_ticklocs()) <= 60
    assert tick_labels(axis) == [f"t{int(at)}" for at in axis.get_ticklocs()]


def test_annotations_hold_the_weights():
    figure = plot_attention_weights([[0.25, 0.75]], annotate=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.25", "0.75"]


def test_nan_is_left_out_of_the_colour_scale():
    figure = plot_attention_weights([[np.nan, 0.5], [0.25, 0.75]])
    assert figure.axes[0].get_images()[0].get_clim() == (0.0, 0.75)
    assert np.isnan(drawn(figure)[0][0, 0])


def test_all_zero_weights_can_be_drawn(tmp_path):
    plot_attention_weights(np.zeros((2, 2))).savefig(tmp_path / "zeros.png")
    assert (tmp_path / "zeros.png").stat().st_size > 0


def test_given_figure_is_drawn_into():
    from matplotlib.figure import Figure

    figure = Figure()
    assert plot_attention_weights(softmax_weights(2, 2), figure=figure, title="weights") is figure
    assert figure.get_suptitle() == "weights"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_tensorflow_tensors(dtype):
    tf = pytest.importorskip("tensorflow")
    (panel,) = drawn(plot_attention_weights(tf.cast([[0.25, 0.75]], dtype)))
    np.testing.assert_array_equal(panel, [[0.25, 0.75]])


def test_symbolic_tensors_are_refused():
    keras = pytest.importorskip("keras")
    with pytest.raises(TypeError, match="call the model on data"):
        plot_attention_weights(keras.Input((4, 4)))


def test_tensors_of_a_function_being_traced_are_refused():
    tf = pytest.importorskip("tensorflow")

    @tf.function
    def trace(weights):
        plot_attention_weights(weights)

    with pytest.raises(TypeError, match="call the model on data"):
        trace(tf.zeros((4, 4)))


@pytest.mark.parametrize(
    "weights, keywords, message",
    [
        (np.zeros(3), {}, r"got shape \(3,\)"),
        (np.zeros((1, 1, 1, 2, 2)), {}, "got shape"),
        (np.zeros((2, 0)), {}, r"must not be empty, got shape \(2, 0\)"),
        (np.zeros((2, 3)), {"query_tokens": ["a"]}, "query_tokens has 1 labels for 2 positions"),
        (np.zeros((2, 3)), {"key_tokens": ["a", "b"]}, "key_tokens has 2 labels for 3 positions"),
        (np.zeros((2, 3, 3)), {"example": 2}, "example 2 is not in a batch of 2"),
        (np.zeros((1, 2, 3, 3)), {"heads": [2]}, r"heads must be in 0..1 and at least one, got \[2\]"),
        (np.zeros((1, 2, 3, 3)), {"heads": []}, "at least one"),
        (np.zeros((2, 3, 3)), {"heads": [0]}, "heads needs weights of rank 4"),
    ],
)
def test_bad_values(weights, keywords, message):
    with pytest.raises(ValueError, match="plot_attention_weights: .*" + message):
        plot_attention_weights(weights, **keywords)


@pytest.mark.parametrize("weights", [np.zeros((2, 2), complex), [["a", "b"]]])
def test_weights_that_are_not_real_numbers(weights):
    with pytest.raises(TypeError, match="must be real numbers"):
        plot_attention_weights(weights)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="matplotlib is not installed: pip install matplotlib"):
        plot_attention_weights(np.eye(2))


def test_masks_have_a_colour_each_for_seen_hidden_and_skipped():
    ax = plot_mask(masks.packed([0, 3, 5]), 6, block=(2, 2))
    [image] = ax.get_images()
    skipped, hidden, seen = 0, 1, 2
    np.testing.assert_array_equal(
        image.get_array(),
        [
            [seen, seen, seen, hidden, skipped, skipped],
            [seen, seen, seen, hidden, skipped, skipped],
            [seen, seen, seen, hidden, hidden, hidden],
            [hidden, hidden, hidden, seen, seen, hidden],
            [skipped, skipped, hidden, seen, seen, hidden],
            [skipped, skipped, hidden, hidden, hidden, hidden],
        ],
    )
    assert len({tuple(image.cmap(image.norm(kind))) for kind in (skipped, hidden, seen)}) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["seen", "hidden", "skipped"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("key", "query", "packed[3]")


def test_masks_are_drawn_into_given_axes_and_by_the_mask_itself():
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    by_head = masks.boolean(np.arange(24).reshape(1, 2, 3, 4) % 5 > 1)
    assert by_head.plot(3, 4, head=1, title="mine", ax=ax) is ax and ax.get_title() == "mine"
    np.testing.assert_array_equal(ax.get_images()[0].get_array() == 2, by_head.materialize(3, 4)[0, 1])
    drawn_array = plot_mask(np.eye(3, dtype=bool), 3).get_images()[0].get_array()
    np.testing.assert_array_equal(drawn_array == 2, np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="plot_mask: entry must be one of 2, got 2"):
        plot_mask(masks.padding(None, [1, 2]), 3, entry=2)


# ---------------------------------------------------------------------------------------------- what can be read of them


def axes_of(figure):
    return [ax for ax in figure.axes if ax.get_images()]


def luminance(colour):
    """Of WCAG 2.2."""
    c = np.asarray(colour[:3])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.wide(3)
@pytest.mark.parametrize("cmap", ["Blues", "viridis", "inferno", "Greys_r", "RdBu"])
def test_numbers_contrast_with_their_cells(cmap):
    weights = np.linspace(0, 1, 12).reshape(3, 4)
    figure = plot_attention_weights(weights, annotate=True, cmap=cmap, power=0.5)
    colours = matplotlib.colormaps[cmap](np.sqrt(weights)).reshape(-1, 4)
    texts = axes_of(figure)[0].texts
    assert [text.get_text() for text in texts] == [f"{x:.2f}" for x in weights.flat]
    for text, colour in zip(texts, colours):
        contrast = sorted([luminance(colour) + 0.05, luminance(matplotlib.colors.to_rgb(text.get_color())) + 0.05])
        assert contrast[1] / contrast[0] > 4.5  # what WCAG asks of text


def test_into_axes():
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2)
    assert plot_attention_weights(softmax_weights(4, 4), ax=right, title="right") is figure
    assert right.get_images() and not left.get_images() and right.get_title() == "right"
    with pytest.raises(ValueError, match=r"ax takes one matrix, and there are 2 heads"):
        plot_attention_weights(softmax_weights(1, 2, 4, 4), ax=left)


def test_scale_of_colours():
    weights = softmax_weights(4, 4)
    figure = plot_attention_weights(weights, vmax=0.25, power=0.5)
    norm = axes_of(figure)[0].get_images()[0].norm
    assert norm.vmax == 0.25 and norm(0.0625) == pytest.approx(0.5)
    labels = tick_labels(figure.axes[-1].yaxis)
    assert labels == ["0", "0.125", "≥ 0.25"]
    assert tick_labels(plot_attention_weights(weights).axes[-1].yaxis)[::2] == ["0", f"{weights.max():.3g}"]
    for wrong in ({"vmax": 0}, {"vmax": np.nan}, {"power": -1}, {"power": "large"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a positive number"):
            plot_attention_weights(weights, **wrong)


def test_crop():
    weights = np.zeros((6, 6))
    weights[1:4, 1:4] = softmax_weights(3, 3)
    (panel,) = drawn(plot_attention_weights(weights, crop=True))
    np.testing.assert_array_equal(panel, weights[1:4, 1:4])
    figure = plot_attention_weights(softmax_weights(6, 6), ["", "a", "", "b", "c", ""], crop=True)
    assert tick_labels(axes_of(figure)[0].xaxis) == ["a", "", "b", "c"] and drawn(figure)[0].shape == (4, 4)


@pytest.mark.wide(2)
@pytest.mark.parametrize("shape", [(3, 60), (60, 3), (300, 300), (1, 200)])
def test_flat_and_large_matrices_can_be_read(shape):
    figure = plot_attention_weights(softmax_weights(*shape))
    figure.canvas.draw()
    (ax,) = axes_of(figure)
    box = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    assert min(box.width, box.height) > 0.8 and max(box.width, box.height) < 14.5
    assert box.width * 72 / shape[1] > 1.5 and box.height * 72 / shape[0] > 1.5  # points of a cell
    for axis in (ax.xaxis, ax.yaxis):
        boxes = sorted((t.get_window_extent() for t in axis.get_ticklabels()), key=lambda b: (b.x0, b.y0))
        assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_mask(masks.causal() & masks.window(5, 0), 40).figure,
        lambda: plot_attention_weights(softmax_weights(3, 60), long_labels(3), long_labels(60), title="a title"),
        lambda: plot_attention_weights(softmax_weights(1, 6, 4, 4), long_labels(4)),
    ],
)
def test_all_of_a_figure_is_inside_of_it(draw):
    """Titles and labels, the longest tokens too, are in the file that `savefig` writes."""
    figure = draw()
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > 0
    sides = [ax.get_window_extent().size / figure.dpi for ax in axes_of(figure)]
    assert min(map(min, sides)) > 0.6  # and the matrices still have room


def long_labels(count):
    return [f"{'antidisestablishmentarianism' * (n % 2)}{n}" for n in range(count)]


def test_notebooks_show_a_figure_once(monkeypatch):
    """The inline backend shows open figures at the end of a cell, and closes them; what a line gives is displayed too."""
    import sys
    import types

    from matplotlib import pyplot

    shown = []
    display = types.SimpleNamespace(display=shown.append, Image=lambda data: data)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    figure = plot_attention_weights(softmax_weights(3, 3))
    figure._ipython_display_()
    assert shown == []
    pyplot.close(figure)  # the end of the cell
    figure._ipython_display_()
    assert shown[0].startswith(b"\x89PNG")
    monkeypatch.undo()
    assert not hasattr(plot_attention_weights(softmax_weights(3, 3)), "_ipython_display_")


# ------------------------------------------------------------------------------------------------- of what was recorded


def recorded():
    hidden = ~np.tri(5, dtype=bool) | (np.arange(5) == 4)
    rng = np.random.default_rng(1)
    weights = np.where(hidden, 0, rng.random((2, 3, 5, 5)) + 0.1)
    weights /= weights.sum(-1, keepdims=True)
    return visualize.ModelAttention.from_weights(
        {"a": weights, "b": weights[:, :2]}, tokens=["x", "y", "$z", "w", ""], hidden=hidden
    )


def test_weights_of_a_layer_with_its_masks_and_tokens():
    layer = recorded()["a"]
    figure = plot_attention_weights(layer, example=1, heads=[2], crop=True)
    np.testing.assert_array_equal(drawn(figure)[0], np.where(layer.hidden[1, 0], np.nan, layer.weights[1, 2])[:4, :4])
    assert tick_labels(axes_of(figure)[0].yaxis) == ["x", "y", "$z", "w"]
    assert axes_of(figure)[0].patch.get_hatch()


def test_over_text():
    layer = recorded()["a"]
    ax = visualize.plot_attention_over_text(layer, example=1, heads=[0, 2], title="text")
    texts = [text for text in ax.texts if text.get_text()]
    assert [text.get_text().replace("\\", "") for text in texts] == ["x", "y", "$z", "w"]
    expected = layer.weights[1, [0, 2]][:, :4].mean((0, 1))  # of real rows
    colours = matplotlib.colormaps["Blues"](expected[:4] / expected[:4].max())
    for text, colour in zip(texts, colours):
        np.testing.assert_allclose(text.get_bbox_patch().get_facecolor(), colour, atol=0.01)
    row = visualize.plot_attention_over_text(layer.weights[1, 0], ["x", "y", "z", "w", "-"], query=2)
    best = np.argmax(layer.weights[1, 0, 2])
    dark = [luminance(text.get_bbox_patch().get_facecolor()) for text in row.texts]
    assert np.argmin(dark) == best
    many = visualize.plot_attention_over_text(np.eye(200), [f"word{i}" for i in range(200)], width=5)
    assert len({text.get_position()[1] for text in many.texts}) > 10
    many.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in many.texts]
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))
    with pytest.raises(ValueError, match="tokens must be given"):
        visualize.plot_attention_over_text(np.eye(3))
    with pytest.raises(ValueError, match="query must be one of 3 rows, got 3"):
        visualize.plot_attention_over_text(np.eye(3), "abc", query=3)


def test_all_heads():
    found = recorded()
    figure = visualize.plot_heads(found, example=1, title="heads")
    panels = axes_of(figure)
    assert len(panels) == 5 and [ax.get_ylabel() for ax in panels if ax.get_ylabel()] == ["a", "b"]
    np.testing.assert_array_equal(
        drawn(figure)[4], np.where(found["b"].hidden[1, 0], np.nan, found["b"].weights[1, 1])[:4, :4]
    )
    assert panels[0].get_xlabel() == f"{found['a'].entropy[1, 0]:.2f}"
    with pytest.raises(ValueError, match="must be probabilities"):
        visualize.plot_heads(np.ones((2, 3, 3)))


def test_weights_that_are_not_dense():
    import tensorflow as tf

    for weights, told in (
        (tf.RaggedTensor.from_tensor(tf.eye(3)), r"got RaggedTensor; pass weights.to_tensor\(\)"),
        (tf.sparse.eye(3), "got SparseTensor; pass tf.sparse.to_dense"),
    ):
        with pytest.raises(TypeError, match=f"plot_attention_weights: weights must be dense, {told}"):
            plot_attention_weights(weights)
