"""BLAS and LAPACK called by address, without the interpreter lock.

scipy's own wrappers hold the interpreter lock for the whole call: two matrices at once would take as long as one
after the other, and Ctrl-C would wait for both. The routines behind them are public, as capsules for Cython; called
through ctypes they release the lock.

Every matrix is a torch tensor in Fortran order (unit stride down a column) on the CPU, float64 or float32, and is
overwritten where the routine says so. Shapes: k = side of a square matrix, w = columns.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from scipy.linalg import cython_blas, cython_lapack
from torch import Tensor

PREFIX = {torch.float64: "d", torch.float32: "s"}
REAL: dict[torch.dtype, Any] = {torch.float64: ctypes.c_double, torch.float32: ctypes.c_float}

_get_name = ctypes.pythonapi.PyCapsule_GetName
_get_name.restype, _get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def syrk(C: Tensor, A: Tensor) -> None:
    """C := C + A Aᵀ in the lower triangle of C (k × k), for A (k × w) in either order."""
    is_fortran = A.stride(0) == 1
    A = A if is_fortran or A.is_contiguous() else fortran(A)
    is_fortran = A.stride(0) == 1
    k, w = A.shape
    unit = REAL[C.dtype](1.0)
    trans, lead = (b"N", k) if is_fortran else (b"T", w)
    _call("syrk", C.dtype, b"L", trans, k, w, unit, A, max(lead, 1), unit, C, max(k, 1))


def potrf(A: Tensor) -> int:
    """A := its Cholesky factor in the lower triangle; 0, or the order of the minor that is not positive."""
    info = ctypes.c_int(0)
    _call("potrf", A.dtype, b"L", len(A), A, max(len(A), 1), info)
    return info.value


def trsm(L: Tensor, X: Tensor, *, transposed: bool) -> None:
    """X (k × w) := L⁻¹ X, or L⁻ᵀ X, for the lower triangle of L (k × k)."""
    k, w = X.shape
    unit = REAL[L.dtype](1.0)
    _call(
        "trsm",
        L.dtype,
        b"L",
        b"L",
        b"T" if transposed else b"N",
        b"N",
        k,
        w,
        unit,
        L,
        max(k, 1),
        X,
        max(k, 1),
    )


def symm(A: Tensor, X: Tensor, Y: Tensor) -> None:
    """Y := A X for symmetric A (k × k), of which the lower triangle is read; X and Y are k × w."""
    k, w = X.shape
    unit, zero = REAL[A.dtype](1.0), REAL[A.dtype](0.0)
    lead = max(k, 1)
    _call("symm", A.dtype, b"L", b"L", k, w, unit, A, lead, X, lead, zero, Y, lead)


def syevr(A: Tensor, uplo: bytes, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues first to last (from 0, ascending) of the triangle of A, and their vectors; A is spent.

    Raises:
        torch.linalg.LinAlgError: no convergence.
    """
    k, m = len(A), last - first + 1
    w, Z = A.new_empty(k), fortran(A.new_empty(k, m))
    support = torch.empty(2 * k, dtype=torch.int32)
    num_found, info = ctypes.c_int(0), ctypes.c_int(0)
    zero = REAL[A.dtype](0.0)

    def run(work: Tensor, num_work: int, iwork: Tensor, num_iwork: int) -> None:
        bounds = (zero, zero, first + 1, last + 1, zero)
        room = (work, num_work, iwork, num_iwork)
        _call("syevr", A.dtype, b"V", b"I", uplo, k, A, k, *bounds, num_found, w, Z, k, support, *room, info)

    query, iquery = A.new_empty(1), torch.empty(1, dtype=torch.int32)
    run(query, -1, iquery, -1)
    size, isize = int(query[0]), int(iquery[0])
    run(A.new_empty(size), size, torch.empty(isize, dtype=torch.int32), isize)
    if info.value or num_found.value != m:
        raise torch.linalg.LinAlgError("syevr did not converge")
    return w[:m], Z


def syevd(A: Tensor, uplo: bytes) -> Tensor:
    """All eigenvalues of the triangle of A, ascending; A is spent.

    Raises:
        torch.linalg.LinAlgError: no convergence.
    """
    k = len(A)
    w, info = A.new_empty(k), ctypes.c_int(0)

    def run(work: Tensor, num_work: int, iwork: Tensor, num_iwork: int) -> None:
        _call("syevd", A.dtype, b"N", uplo, k, A, max(k, 1), w, work, num_work, iwork, num_iwork, info)

    query, iquery = A.new_empty(1), torch.empty(1, dtype=torch.int32)
    run(query, -1, iquery, -1)
    size, isize = int(query[0]), int(iquery[0])
    run(A.new_empty(size), size, torch.empty(isize, dtype=torch.int32), isize)
    if info.value:
        raise torch.linalg.LinAlgError("syevd did not converge")
    return w


def fortran(X: Tensor) -> Tensor:
    """A copy in Fortran order."""
    return torch.empty(X.shape[1], X.shape[0], dtype=X.dtype).copy_(X.T).T


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a routine: Fortran takes every argument by address."""
    boxed = [ctypes.c_int(value) if isinstance(value, int) else value for value in arguments]
    _routine(f"{PREFIX[dtype]}{name}", len(boxed))(*(_address(value) for value in boxed))


def _address(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument if isinstance(argument, bytes) else ctypes.byref(argument)


@cache
def _routine(name: str, num_arguments: int) -> Callable[..., None]:
    """A function that releases the interpreter lock while it runs."""
    module = cython_blas if name in cython_blas.__pyx_capi__ else cython_lapack
    capsule = module.__pyx_capi__[name]
    kinds = [ctypes.c_void_p] * num_arguments
    return ctypes.CFUNCTYPE(None, *kinds)(_get_pointer(capsule, _get_name(capsule)))
