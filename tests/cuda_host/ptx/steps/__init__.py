"""What each instruction does, by the first part of its name.

A binder gets an instruction and the machine, and returns a step: a function of the mask of lanes that take part (True:
all).
"""

from ..program import PtxError

BINDERS = {}


def instruction(*names):
    def register(binder):
        BINDERS.update(dict.fromkeys(names, binder))
        return binder

    return register


def name_of(i):
    return "bar.warp" if i.opcode[:2] == ("bar", "warp") else i.name


def is_of_warps(i):
    """Whether whole warps execute it together."""
    return name_of(i) in ("shfl", "vote", "ldmatrix", "mma", "bar.warp", "wgmma", "setmaxnreg")


def bind(i, machine):
    """The step of an instruction that is not one of control.

    Raises:
        PtxError: the interpreter does not know it.
    """
    from . import arithmetic, conversion, movement, warp, warpgroup  # noqa: F401  they register

    if name_of(i) not in BINDERS:
        raise PtxError(f"the interpreter has no {i.text}")
    if i.guard is not None:
        raise PtxError(f"only branches have guards here, not {i.text}")
    try:
        return BINDERS[name_of(i)](i, machine)
    except (KeyError, ValueError) as error:
        raise PtxError(f"the interpreter does not know this form of {i.text} ({error!r})") from error
