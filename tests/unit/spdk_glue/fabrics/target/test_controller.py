"""A host's controller on the target: who may connect, what it is told, what is kept apart. If these fail, real
initiators do not come up, or one host reaches what is another's."""

import threading
import uuid

import numpy as np
import pytest

from spdk_glue import command, status
from spdk_glue.command import AdminOpcode, Feature, IoOpcode
from spdk_glue.fabrics import records
from spdk_glue.fabrics.authentication import Credentials, DhGroup, HostAuthenticator, Key, Policy
from spdk_glue.fabrics.records import DISCOVERY_NQN, FabricsType, Property
from spdk_glue.fabrics.target.host_access import AllowedHost, HostAccess
from spdk_glue.identify import (
    CONTROLLER_TYPE_DISCOVERY,
    ERROR_LOG_ENTRY,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    SMART_LOG,
    WARNING_SPARE,
    Cns,
    LogPage,
)
from spdk_glue.status import CommandFailed, Status
from tests.unit.spdk_glue.fabrics.target.hosts import BLOCK, HOST, HOST_ID, SUBSYSTEM, Rig, entry

OTHER = "nqn.2026-11.io.kvfs:other"


@pytest.fixture
def rig():
    return Rig()


def connect(rig, *, qid=0, entries=32, subnqn=SUBSYSTEM, hostnqn=HOST, cntlid=0xFFFF, host_id=HOST_ID):
    host = rig.connection()
    data = records.connect_data(host_id, hostnqn, subnqn, cntlid)
    return host.run(records.connect(qid, entries), data.tobytes())


def code(completion) -> int:
    return status.decode(int(completion["status"]))


# Connect


def test_wrong_names_are_told_where(rig):
    completion = connect(rig, subnqn="nqn.2026-11.io.kvfs:nobody")
    assert code(completion) == Status.CONNECT_INVALID_PARAMETERS
    assert completion["cdw0"] == 256 | 1 << 16  # the data's subnqn


def test_bad_connects(rig):
    admin = rig.admin()
    for options, expected in (
        ({"entries": 1}, Status.CONNECT_INVALID_PARAMETERS),
        ({"entries": 1025}, Status.CONNECT_INVALID_PARAMETERS),
        ({"cntlid": 5}, Status.CONNECT_INVALID_PARAMETERS),
        ({"qid": 1, "cntlid": 999}, Status.CONNECT_INVALID_PARAMETERS),
        ({"qid": 1, "cntlid": admin.cntlid, "hostnqn": OTHER}, Status.CONNECT_INVALID_PARAMETERS),
        ({"qid": 1, "cntlid": admin.cntlid, "host_id": uuid.UUID(int=8)}, Status.CONNECT_INVALID_PARAMETERS),
        ({"qid": 1, "cntlid": admin.cntlid, "subnqn": DISCOVERY_NQN}, Status.CONNECT_INVALID_PARAMETERS),
        ({"qid": 65, "cntlid": admin.cntlid}, Status.INVALID_QUEUE),
    ):
        assert code(connect(rig, **options)) == expected, options
    rig.io(admin, qid=1)
    assert code(connect(rig, qid=1, cntlid=admin.cntlid)) == Status.COMMAND_SEQUENCE_ERROR


def test_data_of_connect_that_is_no_name(rig):
    host = rig.connection()
    data = records.connect_data(uuid.UUID(int=1), HOST, SUBSYSTEM)
    data["hostnqn"] = np.void(b"\xff" * 256)
    assert code(host.run(records.connect(0, 32), data.tobytes())) == Status.CONNECT_INVALID_PARAMETERS
    assert code(host.run(records.connect(0, 32), data.tobytes()[:512])) == Status.SGL_LENGTH_INVALID


def test_an_io_queue_needs_an_enabled_controller(rig):
    admin = rig.admin()
    admin.run(records.property_set(Property.CC, 0))
    assert code(connect(rig, qid=1, cntlid=admin.cntlid)) == Status.COMMAND_SEQUENCE_ERROR


def test_hosts_that_are_not_on_the_list():
    rig = Rig(access=HostAccess({HOST: AllowedHost(HOST)}))
    rig.admin()
    assert code(connect(rig, hostnqn=OTHER)) == Status.CONNECT_INVALID_HOST
    assert code(connect(rig, hostnqn=OTHER, subnqn=DISCOVERY_NQN)) == Status.CONNECT_INVALID_HOST


# Authentication


def authenticated_rig(**options):
    credentials = Credentials(Key.generate(), Key.generate(), Policy(groups=(DhGroup.NULL,)))
    return Rig(access=HostAccess({HOST: AllowedHost(HOST, credentials, **options)})), credentials


def authenticate(host, credentials):
    ours = HostAuthenticator(HOST, SUBSYSTEM, credentials)
    while ours.wants_to_send or ours.wants_to_receive:
        if ours.wants_to_send:
            message = ours.next_message()
            host.run(records.authentication(FabricsType.AUTHENTICATION_SEND, len(message)), message)
        else:
            host.run(records.authentication(FabricsType.AUTHENTICATION_RECEIVE, 4096), room=4096)
            ours.receive(host.data)
    return ours


def test_nothing_is_served_before_authentication():
    rig, credentials = authenticated_rig()
    host = rig.connection()
    completion = host.run(
        records.connect(0, 32), records.connect_data(uuid.UUID(int=7), HOST, SUBSYSTEM).tobytes()
    )
    assert completion["cdw0"] >> 16 == records.AUTHREQ_TRANSACTION
    enable = records.property_set(Property.CC, records.CC_ENABLE)
    for early in (enable, records.property_get(Property.CAP), command.identify(1), entry(0x18)):
        assert host.status(early) == Status.AUTHENTICATION_REQUIRED
    assert authenticate(host, credentials).is_authenticated
    assert host.run(enable)["status"] == 0
    # each queue by itself
    io = rig.connection()
    cntlid = int(completion["cdw0"]) & 0xFFFF
    data = records.connect_data(uuid.UUID(int=7), HOST, SUBSYSTEM, cntlid)
    assert io.run(records.connect(1, 32), data.tobytes())["status"] == 0
    assert io.status(command.read(0, 1), room=BLOCK) == Status.AUTHENTICATION_REQUIRED
    assert authenticate(io, credentials).is_authenticated
    assert io.run(command.read(0, 1), room=BLOCK)["status"] == 0
    assert authenticate(host, credentials).is_authenticated  # again, while in use


def test_a_wrong_key_ends_the_connection():
    rig, credentials = authenticated_rig()
    host = rig.connection()
    host.run(records.connect(0, 32), records.connect_data(uuid.UUID(int=7), HOST, SUBSYSTEM).tobytes())
    wrong = Credentials(Key.generate(), credentials.controller_key, credentials.policy)
    assert not authenticate(host, wrong).is_authenticated
    assert not host.connection.is_open


def test_authentication_has_its_time():
    rig, _ = authenticated_rig()
    host = rig.connection()
    host.run(records.connect(0, 32), records.connect_data(uuid.UUID(int=7), HOST, SUBSYSTEM).tobytes())
    rig.now += rig.limits.authentication_seconds + 1
    host.poll()
    assert not host.connection.is_open


def test_a_proof_has_its_time():
    """The queue then serves nothing but the next one; commands may be sent again."""
    rig, credentials = authenticated_rig(reauthenticate_seconds=60)
    host = rig.connection()
    host.run(records.connect(0, 32), records.connect_data(uuid.UUID(int=7), HOST, SUBSYSTEM).tobytes())
    authenticate(host, credentials)
    look = records.property_get(Property.CSTS)
    for _ in range(2):
        rig.now += 59
        host.poll()
        assert host.run(look)["status"] == 0
        rig.now += 2
        host.poll()
        completion = host.run(look)
        assert code(completion) == Status.AUTHENTICATION_REQUIRED and not completion["status"] & 0x8000
        rig.now += rig.limits.authentication_seconds + 1  # idle hosts are not ended
        host.poll()
        assert authenticate(host, credentials).is_authenticated
        assert host.run(look)["status"] == 0


def test_a_host_without_a_key_cannot_authenticate(rig):
    assert rig.admin().status(records.authentication(FabricsType.AUTHENTICATION_SEND, 64), bytes(64)) == (
        Status.INVALID_FIELD
    )


# Properties


def test_properties(rig):
    admin = rig.admin()
    completion = admin.run(records.property_get(Property.CAP))
    cap = int(completion["cdw0"]) | int(completion["cdw1"]) << 32
    assert records.cap_max_queue_entries(cap) == rig.limits.queue_entries
    assert admin.run(records.property_get(Property.CSTS))["cdw0"] == records.CSTS_READY
    assert admin.run(records.property_get(Property.VS))["cdw0"] == records.VERSION_2_0
    bad = records.property_get(Property.CAP)
    bad.view(records.PROPERTY_COMMAND)["attrib"] = 0
    assert admin.status(bad) == Status.INVALID_FIELD
    io = rig.io(admin)
    assert io.status(records.property_get(Property.CAP)) == Status.COMMAND_SEQUENCE_ERROR


def test_reset_ends_the_io_queues_and_their_tickets(rig):
    rig.tickets_wait = True
    admin = rig.admin()
    io = rig.io(admin)
    io.run(command.vendor(IoOpcode.ATTENTION_SUBMIT, 1), bytes([9]) + bytes(BLOCK - 1))
    io.submit(command.vendor(IoOpcode.ATTENTION_FETCH, 1), room=BLOCK)
    event = admin.submit(entry(AdminOpcode.ASYNC_EVENT_REQUEST))
    admin.run(records.property_set(Property.CC, 0))
    assert admin.run(records.property_get(Property.CSTS))["cdw0"] == 0
    io.poll()
    assert not io.connection.is_open and not rig.drive.answers
    for call in rig.waiting.values():  # of a ticket of a connection that is no more
        call()
    io.poll()
    assert admin.status(command.identify(1), room=4096) == Status.COMMAND_SEQUENCE_ERROR
    admin.run(records.property_set(Property.CC, records.CC_ENABLE))
    admin.submit(entry(AdminOpcode.ASYNC_EVENT_REQUEST), cid=event)  # the number is free again
    assert not admin.answers
    rig.io(admin)


def test_shutdown_makes_durable(rig):
    admin = rig.admin()
    admin.run(records.property_set(Property.CC, records.CC_ENABLE | records.CC_SHUTDOWN_NORMAL))
    found = admin.run(records.property_get(Property.CSTS))["cdw0"]
    assert found & records.CSTS_SHUTDOWN == records.CSTS_SHUTDOWN_COMPLETE
    assert [request.opcode for request in rig.drive.seen] == [IoOpcode.FLUSH]


def test_the_admin_connection_takes_the_controller_with_it(rig):
    admin = rig.admin()
    io = rig.io(admin)
    admin.connection.end()
    assert io.woken
    io.poll()
    assert not io.connection.is_open
    assert code(connect(rig, qid=1, cntlid=admin.cntlid)) == Status.CONNECT_INVALID_PARAMETERS


def test_keep_alive(rig):
    admin = rig.admin(keep_alive_ms=2500)  # 3 s, and one of grace
    io = rig.io(admin)
    for _ in range(3):
        rig.now += 3.5
        assert admin.run(entry(AdminOpcode.KEEP_ALIVE))["status"] == 0
    rig.now += 3.5
    io.run(command.flush())  # any command is a sign of life
    rig.now += 3.5
    admin.poll()
    assert admin.connection.is_open
    rig.now += 0.6
    admin.poll()
    io.poll()
    assert not admin.connection.is_open and not io.connection.is_open


# Identify, log pages, features


def identify(host, cns, form, nsid=0, **more):
    entry = command.identify(cns, nsid)
    for name, value in more.items():
        entry[name] |= value
    completion = host.run(entry, room=4096)
    assert completion["status"] == 0
    return np.frombuffer(host.data, form)


def test_identify_controller(rig):
    admin = rig.admin()
    record = identify(admin, Cns.CONTROLLER, IDENTIFY_CONTROLLER)[0]
    assert record["sn"] == b"MEMORY"  # the drive's
    assert (record["cntlid"], record["subnqn"]) == (admin.cntlid, SUBSYSTEM.encode())
    assert record["ioccsz"] * 16 == 64 + rig.limits.in_capsule_bytes
    assert (record["iorcsz"], record["icdoff"], record["kas"], record["maxcmd"]) == (1, 0, 10, 128)
    assert record["mdts"] == 8 and record["sgls"] & 1 and record["cmic"] & 2
    assert record["attention"]["max_tickets"] <= rig.limits.max_tickets


def test_identify_what_initiators_ask_for(rig):
    admin = rig.admin()
    record = identify(admin, Cns.NAMESPACE, IDENTIFY_NAMESPACE, 1)[0]
    assert record["nsze"] == 1024 and record["nmic"] == 1 and any(bytes(record["nguid"]))
    assert identify(admin, Cns.ACTIVE_NAMESPACES, "<u4", 0)[:2].tolist() == [1, 0]
    assert not identify(admin, Cns.ACTIVE_NAMESPACES, "<u4", 1).any()
    described = identify(admin, Cns.NAMESPACE_DESCRIPTORS, "u1", 1)
    assert described[0] == 2 and described[20] == 3  # NGUID, UUID
    assert not identify(admin, Cns.COMMAND_SET_NAMESPACE, "u1", 1).any()
    assert not identify(admin, Cns.COMMAND_SET_CONTROLLER, "u1").any()
    assert identify(admin, Cns.INDEPENDENT_NAMESPACE, "u1", 1)[14] == 1
    assert identify(admin, Cns.CONTROLLERS, "<u2")[:2].tolist() == [1, admin.cntlid]
    assert identify(admin, Cns.NAMESPACE_CONTROLLERS, "<u2", 1)[0] == 1
    assert admin.status(command.identify(Cns.NAMESPACE, 2), room=4096) == Status.INVALID_NAMESPACE
    assert admin.status(command.identify(0x70), room=4096) == Status.INVALID_FIELD
    assert admin.status(command.identify(Cns.CONTROLLER), room=0) == Status.DATA_TRANSFER_ERROR


def test_error_log_is_each_hosts_own(rig):
    first, second = rig.admin(), rig.admin(OTHER)
    io = rig.io(first)
    cid = io.submit(command.read(5000, 1), room=BLOCK)
    page = command.get_log_page(LogPage.ERROR_INFORMATION, 64)
    assert first.run(page, room=64)["status"] == 0
    entry = np.frombuffer(first.data, ERROR_LOG_ENTRY)[0]
    assert (entry["sqid"], entry["cid"], entry["lba"]) == (1, cid, 5000)
    second.run(page, room=64)
    assert not any(second.data)


def test_log_pages(rig):
    admin = rig.admin()
    admin.run(command.get_log_page(LogPage.COMMANDS_SUPPORTED, 4096), room=4096)
    effects = np.frombuffer(admin.data, "<u4")
    assert effects[AdminOpcode.IDENTIFY] == 1 and effects[256 + IoOpcode.WRITE] == 3
    assert effects[256 + IoOpcode.ATTENTION_FETCH] == 1 and effects[256 + 0x99] == 0
    admin.run(command.get_log_page(LogPage.FIRMWARE_SLOTS, 512), room=512)
    assert admin.data[0] == 1
    admin.run(command.get_log_page(LogPage.SUPPORTED_LOG_PAGES, 1024), room=1024)
    assert np.frombuffer(admin.data, "<u4")[[1, 2, 3, 5]].all()
    beyond = command.get_log_page(LogPage.FIRMWARE_SLOTS, 512, offset_bytes=1 << 40)
    assert admin.status(beyond, room=512) == Status.INVALID_FIELD
    assert admin.status(command.get_log_page(0x33, 512), room=512) == Status.INVALID_LOG_PAGE


def test_features(rig):
    admin = rig.admin()
    assert admin.run(command.set_features(Feature.NUM_QUEUES, 1000 | 3 << 16))["cdw0"] == 3 | 3 << 16
    assert code(connect(rig, qid=5, cntlid=admin.cntlid)) == Status.INVALID_QUEUE
    admin.run(command.set_features(Feature.KEEP_ALIVE_TIMER, 1500))
    assert admin.run(command.get_features(Feature.KEEP_ALIVE_TIMER))["cdw0"] == 2000
    host_id = command.get_features(Feature.HOST_IDENTIFIER, 1)
    admin.run(host_id, room=16)
    assert admin.data == uuid.UUID(int=7).bytes
    for bad, expected in (
        (command.set_features(Feature.HOST_IDENTIFIER, 1), Status.COMMAND_SEQUENCE_ERROR),
        (command.set_features(Feature.VOLATILE_WRITE_CACHE, 0), Status.FEATURE_NOT_CHANGEABLE),
        (command.set_features(0x7E, 0), Status.INVALID_FIELD),
        (command.set_features(Feature.NUM_QUEUES, 0xFFFF), Status.INVALID_FIELD),
        (command.get_features(0x7E), Status.INVALID_FIELD),
        (entry(AdminOpcode.SET_FEATURES, cdw10=1 << 31 | 7), Status.FEATURE_NOT_SAVEABLE),
    ):
        assert admin.status(bad) == expected


def test_discovery(rig):
    host = rig.admin(subnqn=DISCOVERY_NQN)
    record = identify(host, Cns.CONTROLLER, IDENTIFY_CONTROLLER)[0]
    assert record["cntrltype"] == CONTROLLER_TYPE_DISCOVERY
    host.run(command.get_log_page(records.DISCOVERY_LOG_PAGE, 2048), room=2048)
    header = np.frombuffer(host.data, records.DISCOVERY_HEADER, 1)[0]
    found = np.frombuffer(host.data, records.DISCOVERY_ENTRY, 1, 1024)[0]
    assert header["numrec"] == 1 and records.nqn_of(found["subnqn"]) == SUBSYSTEM
    assert (found["traddr"], found["trsvcid"]) == (b"127.0.0.1", b"4420")
    assert host.status(command.get_log_page(LogPage.SMART, 512), room=512) == Status.INVALID_LOG_PAGE
    rig.now += rig.limits.discovery_idle_seconds + 1
    host.poll()
    assert not host.connection.is_open


# Events and Abort


def test_events(rig):
    """A warning of the drive reaches a host that asked for it, once until it has looked."""
    page = np.zeros(1, SMART_LOG)
    inner = rig.drive.admin_handlers[AdminOpcode.GET_LOG_PAGE]

    def log_page(requests):
        for request in requests:
            if request.cdw10 & 0xFF == LogPage.SMART:
                request.data[:] = page.view(np.uint8)[: request.data.nbytes]
            else:
                inner([request])

    rig.drive.device._handlers[False][AdminOpcode.GET_LOG_PAGE] = log_page
    admin = rig.admin()
    admin.run(command.set_features(Feature.ASYNC_EVENT_CONFIGURATION, 0xFF))
    cids = [admin.submit(entry(AdminOpcode.ASYNC_EVENT_REQUEST)) for _ in range(4)]
    assert admin.status(entry(AdminOpcode.ASYNC_EVENT_REQUEST)) == Status.ASYNC_EVENT_LIMIT
    page["critical_warning"] = WARNING_SPARE
    for _ in range(3):
        rig.now += 6
        admin.poll()
    assert admin.completion(cids[0])["cdw0"] == 1 | 2 << 8 | LogPage.SMART << 16
    assert not admin.answers
    assert admin.run(command.get_log_page(LogPage.SMART, 512), room=512)["status"] == 0
    page["critical_warning"] = 0
    rig.now += 6
    admin.poll()
    page["critical_warning"] = WARNING_SPARE
    rig.now += 6
    admin.poll()
    assert admin.completion(cids[1])["cdw0"] & 0xFF == 1
    abort = entry(AdminOpcode.ABORT, cdw10=cids[2] << 16)
    assert admin.run(abort)["cdw0"] == 0
    assert code(admin.completion(cids[2])) == Status.ABORTED_BY_REQUEST
    assert admin.run(abort)["cdw0"] == 1  # it is gone


def submit_ticket(io, ticket, length=9):
    return io.run(command.vendor(IoOpcode.ATTENTION_SUBMIT, ticket), bytes([length]) + bytes(BLOCK - 1))


def test_a_fetch_waits_alone(rig):
    """A ticket that is not done must not hold up its connection, or any other."""
    rig.tickets_wait = True
    io = rig.io(rig.admin())
    assert submit_ticket(io, 1)["status"] == 0
    fetch = io.submit(command.vendor(IoOpcode.ATTENTION_FETCH, 1), room=BLOCK)
    assert io.run(command.read(0, 1), room=BLOCK)["status"] == 0
    assert not io.answers
    woken = io.woken
    (call,) = rig.waiting.values()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert io.woken == woken + 1
    io.poll()
    assert io.completion(fetch)["cdw0"] == 9


def test_abort_of_a_fetch(rig):
    rig.tickets_wait = True
    admin = rig.admin()
    io = rig.io(admin)
    submit_ticket(io, 1)
    fetch = io.submit(command.vendor(IoOpcode.ATTENTION_FETCH, 1), room=BLOCK)
    assert admin.run(entry(AdminOpcode.ABORT, cdw10=1 | fetch << 16))["cdw0"] == 0
    io.poll()
    assert code(io.completion(fetch)) == Status.ABORTED_BY_REQUEST
    assert admin.run(entry(AdminOpcode.ABORT, cdw10=1 | 999 << 16))["cdw0"] == 1
    rig.tickets_wait = False  # and the ticket is still there
    assert io.run(command.vendor(IoOpcode.ATTENTION_FETCH, 1), room=BLOCK)["cdw0"] == 9


def test_tickets_are_each_hosts_own(rig):
    first, second = (rig.io(rig.admin(name)) for name in (HOST, OTHER))
    assert submit_ticket(first, 5, 11)["status"] == 0
    for opcode in (IoOpcode.ATTENTION_FETCH, IoOpcode.ATTENTION_CANCEL):
        for ticket in (5, *rig.drive.answers):  # by the host's number, and by the drive's
            assert code(second.run(command.vendor(opcode, ticket), room=BLOCK)) == Status.UNKNOWN_TICKET
    assert submit_ticket(second, 5, 22)["status"] == 0
    assert code(submit_ticket(first, 5)) == Status.TICKET_IN_USE
    assert first.run(command.vendor(IoOpcode.ATTENTION_FETCH, 5), room=BLOCK)["cdw0"] == 11
    assert second.run(command.vendor(IoOpcode.ATTENTION_FETCH, 5), room=BLOCK)["cdw0"] == 22
    assert code(first.run(command.vendor(IoOpcode.ATTENTION_FETCH, 5), room=BLOCK)) == Status.UNKNOWN_TICKET


def test_tickets_of_a_host_are_limited(rig):
    first, second = (rig.io(rig.admin(name)) for name in (HOST, OTHER))
    for ticket in range(rig.limits.max_tickets):
        assert submit_ticket(first, ticket)["status"] == 0
    completion = submit_ticket(first, 1000)
    assert code(completion) == Status.TOO_MANY_TICKETS and not int(completion["status"]) >> 15
    assert submit_ticket(second, 1)["status"] == 0


def test_a_refused_submit_leaves_no_ticket(rig):
    def refuse(requests):
        for request in requests:
            request.fail(CommandFailed(Status.INVALID_DESCRIPTOR, detail=f"ticket {request.cdw10}"))

    rig.drive.device._handlers[True][IoOpcode.ATTENTION_SUBMIT] = refuse
    io = rig.io(rig.admin())
    for _ in range(2):
        assert code(submit_ticket(io, 3)) == Status.INVALID_DESCRIPTOR


def test_who_may_only_read():
    rig = Rig(access=HostAccess({HOST: AllowedHost(HOST, None, read_only=True), OTHER: AllowedHost(OTHER)}))
    admin = rig.admin()
    io = rig.io(admin)
    for opcode in (IoOpcode.WRITE, IoOpcode.DATASET_MANAGEMENT, IoOpcode.SEAL_GROUPS):
        data = bytes(BLOCK)
        assert io.status(entry(opcode), data) == Status.NAMESPACE_WRITE_PROTECTED
    assert io.run(command.read(0, 1), room=BLOCK)["status"] == 0
    assert identify(admin, Cns.NAMESPACE, IDENTIFY_NAMESPACE, 1)[0]["nsattr"] == 1
    assert rig.io(rig.admin(OTHER)).run(command.write(0, 1), bytes(BLOCK))["status"] == 0
