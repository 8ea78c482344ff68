"""What pages that are served have in common: a port, and who may ask it."""

import ipaddress
import socket


def is_local(host: str) -> bool:
    """Whether a name or an address is this machine's own, which no other one reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def require_port(host: str, port: int) -> None:
    """
    Raises:
        ValueError: nothing can be served there.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port (--port) must lie between 1 and 65535, got {port}")
    try:
        with socket.socket(family_of(host, port)) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}): name another port "
            "or host (--port, --host)"
        ) from error


def family_of(host: str, port: int) -> int:
    """IPv4 or IPv6."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]


def tell_address(host: str, port: int) -> None:
    """Where the page is, and who can see it."""
    shown = f"[{host}]" if ":" in host else host
    print(f"The page is at http://{shown}:{port} (Ctrl-C ends it)", flush=True)
    if not is_local(host):
        print("Whoever reaches this machine can use it: there is no password", flush=True)
