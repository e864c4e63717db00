"""In-band authentication of NVMe over fabrics: DH-HMAC-CHAP, both sides, as a core without I/O.

A controller, after a Connect that answered with AUTHREQ_TRANSACTION:

    authenticator = ControllerAuthenticator(subsystem_nqn, host_nqn, credentials)  # one per queue
    authenticator.receive(data)              # Authentication Send: complete with success
    data = authenticator.next_message(room)  # Authentication Receive: complete with success and these data
    authenticator.is_authenticated           # before: serve no other command on this queue
    authenticator.has_failed                 # close the connection after this completion

A host, after a Connect that was answered so, or later to authenticate again:

    authenticator = HostAuthenticator(host_nqn, subsystem_nqn, credentials)
    while authenticator.wants_to_send or authenticator.wants_to_receive:
        if authenticator.wants_to_send:
            ...(records.AUTHENTICATION_SEND, authenticator.next_message())
        else:
            authenticator.receive(...(records.AUTHENTICATION_RECEIVE, MESSAGE_BYTES_MAX))
    if not authenticator.is_authenticated:
        raise authenticator.error()

Credentials hold the keys (`read_key_file`) and the policy: which hashes and DH groups may be agreed on.
"""

from spdk_glue.fabrics.authentication.controller import ControllerAuthenticator, ControllerState
from spdk_glue.fabrics.authentication.dh_groups import DhGroup
from spdk_glue.fabrics.authentication.dhchap import (
    AuthenticationFailed,
    Counter,
    Credentials,
    Failure,
    Policy,
)
from spdk_glue.fabrics.authentication.host import HostAuthenticator, HostState
from spdk_glue.fabrics.authentication.keys import (
    BadKey,
    Hash,
    Key,
    KeyFileError,
    read_key_file,
    write_key_file,
)
from spdk_glue.fabrics.authentication.messages import MESSAGE_BYTES_MAX, FailureReason

__all__ = [
    "MESSAGE_BYTES_MAX",
    "AuthenticationFailed",
    "BadKey",
    "ControllerAuthenticator",
    "ControllerState",
    "Counter",
    "Credentials",
    "DhGroup",
    "Failure",
    "FailureReason",
    "Hash",
    "HostAuthenticator",
    "HostState",
    "Key",
    "KeyFileError",
    "Policy",
    "read_key_file",
    "write_key_file",
]
