import pytest
import torch

from randlora_pl.utils.errors import UserError, build_error, cause, memory_advice, out_of_memory, parse_message

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'fakes.Task'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'fakes.VisionLanguageTask':
        Parser key "learning_rate":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'float'>, <class 'NoneType'>]
          Errors:
            - Expected a <class 'float'>
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: foo
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='learning_rate', val='foo')"""


def test_nested_messages_become_one_line() -> None:
    assert parse_message(NESTED) == "--model.learning_rate: expected a number, not foo"
    bare = """Parser key "a":\n  Expected a <class 'list'>. Got value: all"""
    assert parse_message(bare) == "--a: expected a list such as '[all]', not all"
    literal = """Parser key "a":\n  Expected a typing.Literal['x', 'y']. Got value: z"""
    assert parse_message(literal) == "--a: expected one of x, y, not z"
    assert parse_message("unrecognized arguments: --foo") == "unrecognized arguments: --foo"


def test_user_errors_are_found_below_wrappers() -> None:
    inner = UserError("rank is -1")
    try:
        try:
            raise inner
        except UserError as error:
            raise ValueError("Does not validate against any of the Union subtypes") from error
    except ValueError as outer:
        assert cause(outer) is inner
        assert build_error(outer) is inner
    assert str(build_error(ValueError("first\nsecond"))) == "first"
    assert str(build_error(KeyError())) == "KeyError"


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, verdict: bool) -> None:
    assert out_of_memory(error) is verdict


def test_advice_keeps_the_effective_batch() -> None:
    assert "--data.batch_size 32 --trainer.accumulate_grad_batches 4" in memory_advice(64, 2, "fit", 256)
    assert "gradient_checkpointing" in memory_advice(1, 1, "fit", 256)
    assert "--data.eval_batch_size 128" in memory_advice(64, 2, "test", 256)
