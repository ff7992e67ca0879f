"""Ragged dispatch against the eager loop and Transformers' own backends: outputs, gradients, edge cases, dtypes."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_moe.modeling import dispatch, stacked_experts
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.dispatch import GroupedProduct, grouped_linear, ragged_experts_forward
from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.layer_spec import MoELayerSpec


TOKENS, HIDDEN, INNER, EXPERTS, SLOTS = 24, 32, 48, 4, 2


def build_experts(hidden=HIDDEN, inner=INNER, num_experts=EXPERTS, gated=True, bias=False, backend="ragged"):
    torch.manual_seed(0)
    spec = MoELayerSpec(0, hidden, num_experts, SLOTS, inner, gated=gated, bias=bias)
    experts = FfnExperts(SimpleNamespace(_experts_implementation=backend), spec)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    return experts


def route(tokens=TOKENS, num_experts=EXPERTS, slots=SLOTS, empty_share=0.0):
    """Return distinct random experts (T, K) and weights; the given share of the slots is empty."""
    torch.manual_seed(1)
    index = torch.rand(tokens, num_experts).topk(slots).indices
    empty = torch.randperm(index.numel())[: round(empty_share * index.numel())]
    index.view(-1)[empty] = num_experts
    return index, torch.rand(tokens, slots).masked_fill(index == num_experts, 0.0)


@pytest.fixture(params=["mm", "onednn"])
def product(request, monkeypatch):
    """Send the float32 products through `mm`, as sizes this small are, or through oneDNN, as large ones are."""
    if request.param == "onednn":
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this build of torch has no oneDNN")
        monkeypatch.setattr(dispatch, "ONEDNN_MULTIPLICATIONS", 0)
    return request.param


def poison_memory():
    """Fill the memory that the next allocations recycle with NaN."""
    for size in (16, 64, 256, 1024, 4096, 16384, 65536):
        blocks = [torch.full((size,), float("nan")) for _ in range(8)]
        del blocks


def outputs_and_gradients(backend, experts, hidden_states, index, weight):
    """Return the output and the gradients of the input, of the routing weights and of every parameter."""
    function = FfnExperts.eager if backend == "eager" else ALL_EXPERTS_FUNCTIONS[backend]
    hidden_states = hidden_states.detach().requires_grad_()
    weight = weight.detach().requires_grad_()
    experts.zero_grad()
    poison_memory()
    output = function(experts, hidden_states, index, weight)
    poison_memory()
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape).to(output.dtype))
    return [output, hidden_states.grad, weight.grad, *(parameter.grad for parameter in experts.parameters())]


def assert_equal_to_eager(backend, experts, hidden_states, index, weight, rtol=1e-4, atol=1e-4):
    results = outputs_and_gradients(backend, experts, hidden_states, index, weight)
    expected = outputs_and_gradients("eager", experts, hidden_states, index, weight)
    torch.testing.assert_close(results, expected, rtol=rtol, atol=atol)


def assert_close_in_norm(results, expected, tolerance):
    for result, reference in zip(results, expected, strict=True):
        assert (result.float() - reference.float()).norm() <= tolerance * reference.float().norm()


@pytest.mark.parametrize("empty_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["ragged", "grouped_mm", "batched_mm"])
def test_every_backend_equals_the_eager_loop_on_recycled_memory(backend, gated, bias, empty_share):
    experts = build_experts(gated=gated, bias=bias)
    index, weight = route(empty_share=empty_share)
    assert_equal_to_eager(backend, experts, torch.randn(TOKENS, HIDDEN), index, weight)


def test_all_slots_empty_gives_zeros_and_zero_gradients(product):
    experts = build_experts(bias=True)
    results = outputs_and_gradients("ragged", experts, torch.randn(TOKENS, HIDDEN), *route(empty_share=1.0))
    assert all(result is not None and not result.any() for result in results)


def test_an_idle_expert_gets_a_gradient_of_zeros_and_the_others_do_not(product):
    experts = build_experts()
    index = torch.tensor([[0, 2]]).expand(TOKENS, 2)
    outputs_and_gradients("ragged", experts, torch.randn(TOKENS, HIDDEN), index, torch.rand(TOKENS, 2))
    assert [bool(grad.any()) for grad in experts.gate_up_proj.grad] == [True, False, True, False]
    assert [bool(grad.any()) for grad in experts.down_proj.grad] == [True, False, True, False]


@pytest.mark.parametrize(
    ("tokens", "num_experts", "slots"), [(TOKENS, 1, 1), (1, EXPERTS, 2), (1, EXPERTS, 1), (TOKENS, EXPERTS, 4)]
)
def test_edge_sizes_equal_the_eager_loop(tokens, num_experts, slots, product):
    experts = build_experts(num_experts=num_experts)
    index, weight = route(tokens, num_experts, slots)
    assert_equal_to_eager("ragged", experts, torch.randn(tokens, HIDDEN), index, weight)


def test_one_expert_that_takes_every_slot_equals_the_eager_loop(product):
    index = torch.full((TOKENS, SLOTS), 3)
    assert_equal_to_eager("ragged", build_experts(), torch.randn(TOKENS, HIDDEN), index, torch.rand(TOKENS, SLOTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "inner"), [(63, 97), (30, 50)])
def test_widths_whose_strides_are_no_multiple_of_16_bytes(hidden, inner, dtype, product):
    experts = build_experts(hidden, inner, bias=True).to(dtype)
    index, weight = route(empty_share=0.4)
    arguments = (experts, torch.randn(TOKENS, hidden).to(dtype), index, weight.to(dtype))
    results = outputs_and_gradients("ragged", *arguments)
    assert_close_in_norm(results, outputs_and_gradients("eager", *arguments), 1e-5 if dtype == torch.float32 else 0.01)


def test_non_contiguous_tokens_routing_and_weights(product):
    experts = build_experts()
    for parameter in experts.parameters():
        parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    index, weight = route(empty_share=0.4)
    hidden_states = torch.randn(HIDDEN, TOKENS).t()
    index, weight = index.t().contiguous().t(), weight.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in (hidden_states, index, weight, experts.down_proj))
    assert_equal_to_eager("ragged", experts, hidden_states, index, weight)


def test_weights_that_start_between_16_byte_steps(product):
    experts = build_experts()
    for parameter in experts.parameters():
        shifted = torch.empty(parameter.numel() + 1)[1:].view_as(parameter).copy_(parameter.data)
        parameter.data = shifted
    assert experts.down_proj.data_ptr() % 16 != 0
    assert_equal_to_eager("ragged", experts, torch.randn(TOKENS, HIDDEN), *route())


def test_memory_mapped_weights(tmp_path, product):
    experts = build_experts()
    torch.save(experts.state_dict(), tmp_path / "experts.pt")
    mapped = torch.load(tmp_path / "experts.pt", mmap=True)
    index, weight = route()
    hidden_states = torch.randn(TOKENS, HIDDEN)
    expected = experts.eager(hidden_states, index, weight)
    experts.load_state_dict(mapped, assign=True)
    torch.testing.assert_close(ragged_experts_forward(experts, hidden_states, index, weight), expected)


def test_bf16_stays_near_the_float32_loop():
    experts = build_experts()
    index, weight = route(empty_share=0.4)
    hidden_states = torch.randn(TOKENS, HIDDEN)
    expected = outputs_and_gradients("eager", experts, hidden_states, index, weight)
    results = outputs_and_gradients("ragged", experts.bfloat16(), hidden_states.bfloat16(), index, weight.bfloat16())
    assert {result.dtype for result in results} == {torch.bfloat16}
    assert_close_in_norm(results, expected, 0.02)


def recorded_products(monkeypatch):
    """Record the dtypes of the operands of every `mm` from here on."""
    dtypes = []
    product = torch.mm

    def recorded_product(left, right, **kwargs):
        dtypes.append((left.dtype, right.dtype))
        return product(left, right, **kwargs)

    monkeypatch.setattr(torch, "mm", recorded_product)
    return dtypes


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_the_products_run_in_its_dtype_and_gradients_in_the_weights(bias, monkeypatch):
    experts = build_experts(bias=bias)
    index, weight = route(tokens=3 * TOKENS, empty_share=0.4)
    hidden_states = torch.randn(3 * TOKENS, HIDDEN)
    expected = outputs_and_gradients("eager", experts, hidden_states, index, weight)
    dtypes = recorded_products(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = outputs_and_gradients("ragged", experts, hidden_states, index, weight)
    # Two forward and four backward products per expert in use.
    assert dtypes == 6 * EXPERTS * [(torch.bfloat16, torch.bfloat16)]
    assert {result.dtype for result in results} == {torch.float32}
    assert_close_in_norm(results, expected, 0.02)


@pytest.mark.parametrize("tokens", [1, 4])
def test_under_autocast_the_few_rows_of_an_expert_meet_its_weights_uncast(tokens, product, monkeypatch):
    experts = build_experts()
    index, weight = route(tokens)
    hidden_states = torch.randn(tokens, HIDDEN)
    expected = outputs_and_gradients("eager", experts, hidden_states, index, weight)
    onednn = torch.ops.mkldnn._linear_pointwise if product == "onednn" else None
    dtypes = recorded_products(monkeypatch)
    if onednn is not None:
        monkeypatch.setattr(
            torch.ops.mkldnn,
            "_linear_pointwise",
            lambda left, right, *rest: dtypes.append((left.dtype, right.dtype)) or onednn(left, right, *rest),
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = outputs_and_gradients("ragged", experts, hidden_states, index, weight)
    hit = index.flatten().bincount(minlength=EXPERTS)
    # Only the gradients of weights, and only those that sum over rows, are products in the dtype of autocast.
    assert dtypes.count((torch.bfloat16, torch.bfloat16)) == 2 * int((hit > 1).sum())
    assert dtypes.count((torch.float32, torch.float32)) == 4 * int((hit > 0).sum()) + 2 * int((hit == 1).sum())
    assert {result.dtype for result in results} == {torch.float32}
    assert_close_in_norm(results, expected, 0.03)


def test_large_float32_products_go_to_onednn_while_it_is_enabled():
    left, right = torch.randn(64, 128), torch.randn(256, 128)
    available = torch.backends.mkldnn.is_available()
    assert dispatch.onednn_serves(left, right) is available
    assert not dispatch.onednn_serves(left[:1], right)
    assert not dispatch.onednn_serves(left.bfloat16(), right.bfloat16())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not dispatch.onednn_serves(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_routings_bring_few_new_shapes_to_onednn(dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "ONEDNN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(dispatch, "write_product", watched := Watched(dispatch.write_product))
    experts = build_experts(num_experts=16).to(dtype)
    counts = set()
    for seed in range(12):
        torch.manual_seed(seed)
        index = (torch.rand(700, 16) + torch.linspace(0, 0.5, 16)).topk(2).indices
        counts |= set(index.flatten().bincount().tolist())
        weight = torch.rand(index.shape, dtype=dtype)
        tokens = torch.randn(700, HIDDEN, dtype=dtype).requires_grad_()
        ragged_experts_forward(experts, tokens, index, weight).sum().backward()
    # Each of two weights has three products: forward, back to the rows, and its own gradient.
    assert len(counts) > 80 and len(watched.shapes) < 6 * len(counts) / 4


class Watched:
    """Notes the shapes of products."""

    def __init__(self, product):
        self.product = product
        self.shapes = set()

    def __call__(self, left, right, out):
        self.shapes.add((left.shape, right.shape))
        self.product(left, right, out)


@pytest.mark.parametrize("rows", [9, 64, 128, 255, 256, 257, 1000])
def test_rounded_rows_are_few_more(rows):
    assert rows <= dispatch.rounded(rows) < rows + max(8, rows / 4)
    assert dispatch.rounded(dispatch.rounded(rows)) == dispatch.rounded(rows)


def test_what_runs_on_into_the_next_group_leaves_nothing_there(monkeypatch):
    monkeypatch.setattr(dispatch, "ONEDNN_MULTIPLICATIONS", 0)
    weight, offsets = torch.randn(3, 16, 32).requires_grad_(), torch.tensor([11, 30, 45], dtype=torch.int32)
    rows = torch.randn(45, 32)
    rows[11:30] = float("nan")
    rows.requires_grad_()
    output = grouped_linear(rows, weight, offsets)
    output.sum().backward()
    assert output[:11].isfinite().all() and output[30:].isfinite().all() and output[11:30].isnan().all()
    assert rows.grad.isfinite().all() and weight.grad[[0, 2]].isfinite().all()
    torch.testing.assert_close(output[30:], rows[30:] @ weight[2].t())


def test_repeated_runs_are_bitwise_equal_and_serve_deterministic_mode():
    experts = build_experts(bias=True)
    arguments = (experts, torch.randn(TOKENS, HIDDEN), *route(empty_share=0.4))
    first = [result.clone() for result in outputs_and_gradients("ragged", *arguments)]
    torch.use_deterministic_algorithms(True)
    try:
        second = outputs_and_gradients("ragged", *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_output_of_a_token_does_not_depend_on_the_order_of_the_others():
    experts = build_experts()
    index, weight = route(empty_share=0.4)
    hidden_states = torch.randn(TOKENS, HIDDEN)
    order = torch.randperm(TOKENS)
    output = ragged_experts_forward(experts, hidden_states, index, weight)
    shuffled = ragged_experts_forward(experts, hidden_states[order], index[order], weight[order])
    torch.testing.assert_close(shuffled, output[order])


def test_products_follow_the_filled_slots(monkeypatch):
    rows = []
    product = torch.mm

    def counted_product(left, right, **kwargs):
        rows.append(left.shape[0])
        return product(left, right, **kwargs)

    index, weight = route(empty_share=0.4)
    experts = build_experts()
    monkeypatch.setattr(torch, "mm", counted_product)
    with torch.no_grad():
        ragged_experts_forward(experts, torch.randn(TOKENS, HIDDEN), index, weight)
    assert sum(rows) == 2 * int((index < EXPERTS).sum())


def test_frozen_experts_and_frozen_inputs_cost_no_backward_product(monkeypatch):
    experts = build_experts()
    index, weight = route()
    for frozen in ("experts", "input"):
        experts.requires_grad_(frozen == "input")
        hidden_states = torch.randn(TOKENS, HIDDEN, requires_grad=frozen == "experts")
        output = ragged_experts_forward(experts, hidden_states, index, weight)
        with monkeypatch.context() as patch:
            calls = []
            product = torch.mm
            patch.setattr(torch, "mm", lambda *args, **kwargs: calls.append(1) or product(*args, **kwargs))  # noqa: B023
            output.sum().backward()
        # Frozen experts: the gradient of the rows, twice. Frozen input: also the weights', but not the first rows'.
        assert len(calls) == EXPERTS * (2 if frozen == "experts" else 3)


@pytest.mark.parametrize("backend", ["ragged", "grouped_mm", "batched_mm", "eager"])
def test_the_config_picks_the_function_that_runs(backend, monkeypatch):
    experts = build_experts(backend=backend)
    called = []
    for name in ("grouped_mm", "batched_mm"):
        function = ALL_EXPERTS_FUNCTIONS[name]
        monkeypatch.setitem(
            ALL_EXPERTS_FUNCTIONS._global_mapping,
            name,
            lambda *args, name=name, function=function: called.append(name) or function(*args),
        )
    eager = FfnExperts.eager
    monkeypatch.setattr(FfnExperts, "eager", lambda *args: called.append("eager") or eager(*args))
    ragged = stacked_experts.ragged_experts_forward
    monkeypatch.setattr(
        stacked_experts, "ragged_experts_forward", lambda *args: called.append("ragged") or ragged(*args)
    )
    index, weight = route(empty_share=0.4)
    with torch.no_grad():
        experts(torch.randn(TOKENS, HIDDEN), ExpertAssignment(index, weight, EXPERTS))
    assert called == [backend]


def test_the_code_of_another_checkpoint_runs_no_experts(monkeypatch):
    experts, (index, weight) = build_experts(), route()
    hidden_states = torch.randn(TOKENS, HIDDEN)
    expected = ragged_experts_forward(experts, hidden_states, index, weight)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "ragged", lambda *args: pytest.fail("not ours"))
    assert torch.equal(experts(hidden_states, ExpertAssignment(index, weight, EXPERTS)), expected)


def test_an_unknown_backend_is_refused():
    index, weight = route()
    with pytest.raises(KeyError, match="scattered"):
        build_experts(backend="scattered")(torch.randn(TOKENS, HIDDEN), ExpertAssignment(index, weight, EXPERTS))


def test_gradient_checkpointing_changes_nothing():
    experts = build_experts()
    index, weight = route(empty_share=0.4)
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(3)
        hidden_states = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        weight = weight.detach().requires_grad_()
        experts.zero_grad()
        arguments = (experts, hidden_states, index, weight)
        if use_checkpoint:
            output = checkpoint(ragged_experts_forward, *arguments, use_reentrant=False)
        else:
            output = ragged_experts_forward(*arguments)
        output.square().sum().backward()
        gradients.append([output, hidden_states.grad, weight.grad, *(p.grad for p in experts.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", ["ragged", "grouped_mm"])
def test_compiled_once_for_every_routing(backend):
    experts = build_experts(backend=backend)
    counter = CompileCounter()
    torch._dynamo.reset()
    # grouped_mm compiles whole; ragged breaks the graph, since the sizes of its products are data.
    compiled = torch.compile(experts, backend=counter, fullgraph=backend == "grouped_mm")
    frames = []
    for empty_share in (0.0, 0.4, 0.2):
        index, weight = route(empty_share=empty_share)
        hidden_states = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        output = compiled(hidden_states, ExpertAssignment(index, weight, EXPERTS))
        output.sum().backward()
        torch.testing.assert_close(output, experts.eager(hidden_states, index, weight), rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


@pytest.mark.parametrize("empty_share", [0.0, 0.4])
def test_the_gpu_kernel_and_the_loop_of_products_agree(empty_share, monkeypatch):
    # `F.grouped_mm` also runs on the CPU, which is how its branch is checked on machines without a GPU.
    experts = build_experts(bias=True)
    index, weight = route(empty_share=empty_share)
    arguments = (experts, torch.randn(TOKENS, HIDDEN), index, weight)
    expected = [result.clone() for result in outputs_and_gradients("ragged", *arguments)]
    monkeypatch.setattr(dispatch, "grouped_kernel_serves", lambda rows, weight: True)
    monkeypatch.setattr(GroupedProduct, "apply", None)
    torch.testing.assert_close(outputs_and_gradients("ragged", *arguments), expected, rtol=1e-4, atol=1e-4)


def test_grouped_linear_passes_a_numerical_gradient_check():
    torch.manual_seed(0)
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([2, 2, 6, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *args: grouped_linear(args[0], args[1], offsets, args[2]), (rows, weight, bias)
    )


def test_ragged_serves_the_experts_of_transformers():
    qwen = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=48, num_experts=4)
    # GPT-OSS: transposed weights, interleaved gate and up, biases.
    gpt_oss = GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    index, weight = route()
    hidden_states = torch.randn(TOKENS, HIDDEN)
    for experts in (Qwen3MoeExperts(qwen), GptOssExperts(gpt_oss)):
        gradients = []
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        for backend in ("eager", "ragged"):
            experts.config._experts_implementation = backend
            experts.zero_grad()
            output = experts(hidden_states, index, weight)
            output.square().sum().backward()
            gradients.append([output, *(parameter.grad for parameter in experts.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)
