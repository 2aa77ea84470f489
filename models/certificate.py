"""Certified upper bounds on a CCU's confidence."""


def confidence_bound(ccu, x, radius, method="tight"):
    raise NotImplementedError


def certified_radius(ccu, x, ratio=1.1, method="tight"):
    raise NotImplementedError
