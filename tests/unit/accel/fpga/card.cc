// A simulated card: the kernel, its registers behind a C interface, and a memory that takes its time.
//
// The memory checks what AXI4 asks of a master: bursts of whole beats within a page of 4096 bytes, what is valid stays
// so and as it is until it is taken. A break of these rules is counted. Addresses beyond the memory answer DECERR. What
// is written is there when it is acknowledged.

#include <cstdint>
#include <cstring>
#include <deque>

#include "Vcard.h"
#include "verilated.h"

namespace {

constexpr int kBeatBytes = KVFS_BEAT_BITS / 8;
constexpr int kDecodeError = 3;

struct Random {
    uint64_t state = 1;
    uint64_t next() { return (state = state * 6364136223846793005ULL + 1442695040888963407ULL) >> 33; }
    bool hits(int of_256) { return of_256 && static_cast<int>(next() & 255) < of_256; }
};

struct Burst {
    uint64_t address, beats, due;
};

struct Write {
    uint64_t address;
    std::basic_string<uint8_t> data;
    uint64_t due;
};

struct Memory {
    uint8_t *bytes = nullptr;
    uint64_t size = 0;
    int stall = 0, latency = 0;
    bool is_dead = false;  // answers nothing any more
    Random random;
    uint64_t now = 0, broken_rules = 0;
    bool has(uint64_t address) const { return address + kBeatBytes <= size; }
};

// One port's state; what is offered in a cycle is decided before it, from registers only, as in hardware.
struct Port {
    std::deque<Burst> reads;
    std::deque<uint64_t> write_addresses;
    std::deque<Write> writes;
    std::deque<std::basic_string<uint8_t>> write_data;
    bool offers_read = false, offers_ack = false, last_was_held = false;
    uint64_t held_address = 0, held_length = 0;
};

struct Card {
    VerilatedContext context;
    Vcard top{&context};
    Memory memory;
    Port ports[3];
};

#define EACH_PORT(DO) DO(0, job) DO(1, keys) DO(2, values)

void offer(Card *it) {
    Memory &memory = it->memory;
    Random &random = memory.random;
    Vcard &top = it->top;
#define OFFER(N, NAME)                                                                                              \
    {                                                                                                               \
        Port &port = it->ports[N];                                                                                  \
        top.m_axi_##NAME##_arready = !memory.is_dead && port.reads.size() < 8 && !random.hits(memory.stall);        \
        top.m_axi_##NAME##_awready = !memory.is_dead && !random.hits(memory.stall);                                 \
        top.m_axi_##NAME##_wready = !memory.is_dead && !random.hits(memory.stall);                                  \
        bool due = !port.reads.empty() && port.reads.front().due <= memory.now && !memory.is_dead;                  \
        port.offers_read = due && (port.offers_read || !random.hits(memory.stall));                                 \
        top.m_axi_##NAME##_rvalid = port.offers_read;                                                               \
        if (port.offers_read) {                                                                                     \
            Burst &burst = port.reads.front();                                                                      \
            bool inside = memory.has(burst.address);                                                                \
            if (inside) std::memcpy(&top.m_axi_##NAME##_rdata[0], memory.bytes + burst.address, kBeatBytes);        \
            top.m_axi_##NAME##_rresp = inside ? 0 : kDecodeError;                                                   \
            top.m_axi_##NAME##_rlast = burst.beats == 1;                                                            \
        }                                                                                                           \
        bool written = !port.writes.empty() && port.writes.front().due <= memory.now && !memory.is_dead;            \
        port.offers_ack = written && (port.offers_ack || !random.hits(memory.stall));                               \
        top.m_axi_##NAME##_bvalid = port.offers_ack;                                                                \
        if (port.offers_ack)                                                                                        \
            top.m_axi_##NAME##_bresp = memory.has(port.writes.front().address) ? 0 : kDecodeError;                  \
    }
    EACH_PORT(OFFER)
}

void take(Card *it) {
    Memory &memory = it->memory;
    Vcard &top = it->top;
#define TAKE(N, NAME)                                                                                               \
    {                                                                                                               \
        Port &port = it->ports[N];                                                                                  \
        uint64_t address = top.m_axi_##NAME##_araddr, length = top.m_axi_##NAME##_arlen;                            \
        bool held = port.last_was_held;                                                                             \
        if (held && (!top.m_axi_##NAME##_arvalid || address != port.held_address || length != port.held_length))    \
            memory.broken_rules++;                                                                                  \
        port.last_was_held = top.m_axi_##NAME##_arvalid && !top.m_axi_##NAME##_arready;                             \
        port.held_address = address;                                                                                \
        port.held_length = length;                                                                                  \
        if (top.m_axi_##NAME##_arvalid && top.m_axi_##NAME##_arready) {                                             \
            uint64_t last = address + (length + 1) * kBeatBytes - 1;                                                \
            if (address % kBeatBytes || address / 4096 != last / 4096 || top.m_axi_##NAME##_arburst != 1)           \
                memory.broken_rules++;                                                                              \
            uint64_t wait = memory.latency ? memory.random.next() % memory.latency : 0;                             \
            port.reads.push_back({address, length + 1, memory.now + 1 + wait});                                     \
        }                                                                                                           \
        if (top.m_axi_##NAME##_rvalid && !top.m_axi_##NAME##_rready) memory.broken_rules++; /* our own promise */   \
        if (top.m_axi_##NAME##_rvalid && top.m_axi_##NAME##_rready) {                                               \
            Burst &burst = port.reads.front();                                                                      \
            burst.address += kBeatBytes;                                                                            \
            if (!--burst.beats) port.reads.pop_front();                                                             \
            port.offers_read = false;                                                                               \
        }                                                                                                           \
        if (top.m_axi_##NAME##_awvalid && top.m_axi_##NAME##_awready)                                               \
            port.write_addresses.push_back(top.m_axi_##NAME##_awaddr);                                              \
        if (top.m_axi_##NAME##_wvalid && top.m_axi_##NAME##_wready) {                                               \
            auto bytes = reinterpret_cast<const uint8_t *>(&top.m_axi_##NAME##_wdata[0]);                           \
            port.write_data.emplace_back(bytes, kBeatBytes);                                                        \
            if (!top.m_axi_##NAME##_wlast) memory.broken_rules++;                                                   \
        }                                                                                                           \
        if (top.m_axi_##NAME##_bvalid && top.m_axi_##NAME##_bready) {                                               \
            Write &write = port.writes.front();                                                                     \
            if (memory.has(write.address))                                                                          \
                std::memcpy(memory.bytes + write.address, write.data.data(), kBeatBytes);                           \
            port.writes.pop_front();                                                                                \
            port.offers_ack = false;                                                                                \
        }                                                                                                           \
        while (!port.write_addresses.empty() && !port.write_data.empty()) {                                         \
            uint64_t wait = memory.latency ? memory.random.next() % memory.latency : 0;                             \
            port.writes.push_back(                                                                                  \
                {port.write_addresses.front(), port.write_data.front(), memory.now + 1 + wait});                    \
            port.write_addresses.pop_front();                                                                       \
            port.write_data.pop_front();                                                                            \
        }                                                                                                           \
    }
    EACH_PORT(TAKE)
}

void tick(Card *it) {
    offer(it);
    it->top.eval();
    take(it);
    it->top.ap_clk = 1;
    it->top.eval();
    it->top.ap_clk = 0;
    it->top.eval();
    it->memory.now++;
}

}  // namespace

extern "C" {

Card *kvfs_card_open(uint8_t *bytes, uint64_t size) {
    Card *it = new Card;
    it->memory.bytes = bytes;
    it->memory.size = size;
    it->top.ap_rst_n = 0;
    it->top.ap_clk = 0;
    for (int n = 0; n < 4; n++) tick(it);
    it->top.ap_rst_n = 1;
    tick(it);
    return it;
}

void kvfs_card_close(Card *it) {
    it->top.final();
    delete it;
}

// latency: of a burst, up to so many cycles; stall: of 256, how often a channel is held up; is_dead: for good
void kvfs_card_memory(Card *it, uint64_t seed, int latency, int stall, int is_dead) {
    it->memory.random.state = seed;
    it->memory.latency = latency;
    it->memory.stall = stall;
    it->memory.is_dead = is_dead;
}

uint64_t kvfs_card_broken_rules(Card *it) { return it->memory.broken_rules; }

uint64_t kvfs_card_cycles(Card *it) { return it->memory.now; }

void kvfs_card_tick(Card *it, uint64_t cycles) {
    for (uint64_t n = 0; n < cycles; n++) tick(it);
}

int kvfs_card_read(Card *it, uint16_t address, uint32_t *value) {
    Vcard &top = it->top;
    top.s_axi_control_araddr = address;
    top.s_axi_control_arvalid = top.s_axi_control_rready = 1;
    top.eval();
    while (!top.s_axi_control_arready) tick(it);
    tick(it);
    top.s_axi_control_arvalid = 0;
    top.eval();
    while (!top.s_axi_control_rvalid) tick(it);
    *value = top.s_axi_control_rdata;
    int response = top.s_axi_control_rresp;
    tick(it);
    top.s_axi_control_rready = 0;
    return response;
}

int kvfs_card_write(Card *it, uint16_t address, uint32_t value, uint8_t strobes) {
    Vcard &top = it->top;
    top.s_axi_control_awaddr = address;
    top.s_axi_control_wdata = value;
    top.s_axi_control_wstrb = strobes;
    top.s_axi_control_awvalid = top.s_axi_control_wvalid = top.s_axi_control_bready = 1;
    top.eval();
    while (!(top.s_axi_control_awready && top.s_axi_control_wready)) tick(it);
    tick(it);
    top.s_axi_control_awvalid = top.s_axi_control_wvalid = 0;
    top.eval();
    while (!top.s_axi_control_bvalid) tick(it);
    int response = top.s_axi_control_bresp;
    tick(it);
    top.s_axi_control_bready = 0;
    return response;
}
}
