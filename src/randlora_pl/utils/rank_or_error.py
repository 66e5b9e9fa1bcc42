"""Options of a low-rank approximation: a rank or an error."""

from randlora_pl.utils.errors import UserError


def check_rank_or_error(rank: int | None, error: float | None) -> None:
    """Raise an error unless exactly one of rank and error is given, in its range.

    Raises:
        UserError: Both or neither are given, or the value is out of range.
    """
    if (rank is None) == (error is None):
        raise UserError(
            "Pass either --rank K or --error E (relative, in the Frobenius norm), for example --error 0.05."
        )
    if rank is not None and rank < 1:
        raise UserError(f"--rank is {rank}. Pass a positive integer.")
    if error is not None and not 0 <= error < 1:
        raise UserError(f"--error is {error}. Pass a relative error of at least 0 and below 1, for example 0.05.")
