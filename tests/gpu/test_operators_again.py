"""Tests of tests/ops themselves, with torch's default device being the GPU: nothing is copied, only run again."""

# ruff: noqa: F401
import pytest
import torch

from tests.ops import test_registration as registration
from tests.ops.test_add_act_conv import (
    test_add_act,
    test_add_act_keeps_the_sign_of_zero,
    test_add_act_of_two_dtypes_computes_as_eager_promotes,
)
from tests.ops.test_autograd import (
    test_backward_of_an_eval_forward_after_a_training_forward,
    test_changing_a_saved_operand_before_backward_is_an_error,
    test_changing_the_output_is_harmless_or_an_error,
    test_checkpointing_recomputes_the_same_gradients,
    test_every_subset_of_wanted_gradients,
    test_retain_graph_gives_the_same_gradients_again,
    test_saved_tensor_hooks_see_and_may_move_what_is_saved,
    test_statistics_are_updated_without_gradients,
    test_two_forwards_then_their_backwards_in_either_order,
)
from tests.ops.test_layouts import (
    test_expanded_operands_and_gradients_are_read_and_not_written,
    test_gradient_of_sum,
    test_no_operand_is_written,
    test_output_and_gradients_keep_the_layout,
    test_strides,
)
from tests.ops.test_registration import test_fake_tensors_have_the_real_ones_strides
from tests.ops.test_shapes import (
    test_empty_batch_keeps_statistics_and_gives_zero_gradients,
    test_empty_batch_through_the_stem_and_add_act,
    test_larger_than_the_cache,
    test_many_values_per_channel,
    test_other_ranks_are_the_same_numbers,
)
from tests.ops.test_special_values import (
    test_a_special_value_in_training_spoils_its_channel_and_no_other,
    test_overflow_of_a_narrow_dtype_is_infinite_and_not_clamped,
    test_pooling_ties_and_nan_route_gradients_as_max_pool2d_does,
    test_specials_through_add_act,
    test_specials_through_eval_and_their_gradients,
    test_specials_through_the_stem,
)
from tests.ops.test_statistics import (
    test_any_momentum,
    test_borders_at_another_level,
    test_constant_channels_give_the_bias,
    test_first_values_far_from_the_rest,
    test_huge_values_are_finite_and_right,
    test_large_values_are_finite_and_right,
    test_running_statistics_of_the_activations_dtype,
    test_variance_at_a_large_mean,
    test_variance_with_a_trend_over_the_batch,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Some operators exist on the CPU only: those are tried that the device has."""
    if metafunc.function is test_opcheck_of_device_operators:
        names = registration.registered_for(metafunc.config.getoption("--gpu-tests-on").partition(":")[0])
        # The convolutions are PyTorch's own here: what opcheck would say is about them.
        metafunc.parametrize("name", [name for name in names if not name.startswith("conv2d")])


def test_no_operator_is_missing(device: torch.device) -> None:
    assert set(registration.ON_EVERY_DEVICE) <= set(registration.registered_for(device.type))


def test_opcheck_of_device_operators(name: str) -> None:
    registration.test_opcheck_of_device_operators(name)


@pytest.mark.parametrize("name", registration.OPCHECKED_HERE)
def test_opcheck_of_differentiable_operators(name: str) -> None:
    registration.test_opcheck_of_differentiable_operators(name, "NHWC")
