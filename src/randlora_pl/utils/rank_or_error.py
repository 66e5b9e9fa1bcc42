"""How closely an update is to be approximated: by a rank, or by an error."""

from randlora_pl.utils.errors import UserError


def check_rank_or_error(rank: int | None, error: float | None) -> None:
    """Complains unless exactly one of a rank and an error is given, and possible.

    Raises:
        UserError: As said.
    """
    if (rank is None) == (error is None):
        raise UserError(
            "give either --rank K or --error E (relative, in the Frobenius norm), for example --error 0.05."
        )
    if rank is not None and rank < 1:
        raise UserError(f"--rank is {rank}: give a positive whole number.")
    if error is not None and not 0 <= error < 1:
        raise UserError(f"--error is {error}: give a relative error of at least 0 and below 1, for example 0.05.")
