// A simulated attention core behind a C interface: one unit a call, beats straight from pages in memory; or a cycle a
// call, all pins in the caller's hands.
//
// Streams may be held up at random, as flash and other traffic would, to test the core; STALL is out of 256.

#include <cstdint>
#include <cstring>

#include "Vcore.h"
#include "verilated.h"
#if VM_COVERAGE
#include "verilated_cov.h"
#endif

extern "C" {
struct kvfs_inputs {
    const uint8_t *data[4];
    uint8_t valid[4], last[4], answer_ready;
    uint8_t write_address, strobes, write_address_valid, write_valid, response_ready;
    uint8_t read_address, read_valid, read_ready;
    uint32_t write_data;
};
struct kvfs_outputs {
    uint8_t *answer;
    uint8_t ready[4], answer_valid, answer_last;
    uint8_t write_address_ready, write_ready, response_valid, response;
    uint8_t read_address_ready, read_data_valid, read_response, status;
    uint32_t read_data;
};
}

namespace {

constexpr int kBeatBytes = KVFS_BEAT_BITS / 8;

struct Random {
    uint64_t state;
    bool hits(int of_256) {
        if (!of_256) return false;
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        return static_cast<int>(state >> 56) < of_256;
    }
};

struct Core {
    VerilatedContext context;
    Vcore core{&context};
    Random random{1};
    int stall = 0;
};

void tick(Core *it) {
    it->core.clk = 1;
    it->core.eval();
    it->core.clk = 0;
    it->core.eval();
}

// Where a stream of pages stands.
struct Pages {
    const uint64_t *address;
    const uint32_t *tokens;
    uint64_t count;
    uint64_t beats_of_token;
    uint64_t page = 0, beat = 0;

    bool ended() const { return page == count; }
    const uint8_t *now() const {
        return reinterpret_cast<const uint8_t *>(address[page]) + beat * kBeatBytes;
    }
    bool is_last() const { return beat + 1 == tokens[page] * beats_of_token; }
    void advance() {
        if (is_last()) {
            page += 1;
            beat = 0;
        } else {
            beat += 1;
        }
    }
};

}  // namespace

extern "C" {

Core *kvfs_core_open() {
    Core *it = new Core;
    it->core.rst = 1;
    it->core.clk = 0;
    it->core.eval();
    tick(it);
    it->core.rst = 0;
    it->core.eval();
    return it;
}

void kvfs_core_close(Core *it) {
    it->core.final();
    delete it;
}

// seed, stall: of the random holds; stall 0: none
void kvfs_core_stall(Core *it, uint64_t seed, int stall) {
    it->random.state = seed;
    it->stall = stall;
}

// What the simulation has covered so far, to a file; -1: it was not built to count that.
int kvfs_core_coverage(Core *it, const char *path) {
#if VM_COVERAGE
    it->context.coveragep()->write(path);
    return 0;
#else
    return -1;
#endif
}

// A cycle. Streams are command, blocks, keys, values; their data is where `data` says, read only if it is valid. What the
// core says comes from before the clock's edge.
void kvfs_core_cycle(Core *it, const kvfs_inputs *in, kvfs_outputs *out) {
    Vcore &core = it->core;
    core.s_axis_command_tvalid = in->valid[0];
    core.s_axis_blocks_tvalid = in->valid[1];
    core.s_axis_keys_tvalid = in->valid[2];
    core.s_axis_values_tvalid = in->valid[3];
    core.s_axis_command_tlast = in->last[0];
    core.s_axis_keys_tlast = in->last[2];
    core.s_axis_values_tlast = in->last[3];
    if (in->valid[0]) std::memcpy(&core.s_axis_command_tdata[0], in->data[0], kBeatBytes);
    if (in->valid[1]) std::memcpy(&core.s_axis_blocks_tdata[0], in->data[1], KVFS_BLOCK_BITS / 8);
    if (in->valid[2]) std::memcpy(&core.s_axis_keys_tdata[0], in->data[2], kBeatBytes);
    if (in->valid[3]) std::memcpy(&core.s_axis_values_tdata[0], in->data[3], kBeatBytes);
    core.m_axis_answer_tready = in->answer_ready;
    core.s_axi_awaddr = in->write_address;
    core.s_axi_wdata = in->write_data;
    core.s_axi_wstrb = in->strobes;
    core.s_axi_awvalid = in->write_address_valid;
    core.s_axi_wvalid = in->write_valid;
    core.s_axi_bready = in->response_ready;
    core.s_axi_araddr = in->read_address;
    core.s_axi_arvalid = in->read_valid;
    core.s_axi_rready = in->read_ready;
    core.eval();
    out->ready[0] = core.s_axis_command_tready;
    out->ready[1] = core.s_axis_blocks_tready;
    out->ready[2] = core.s_axis_keys_tready;
    out->ready[3] = core.s_axis_values_tready;
    out->answer_valid = core.m_axis_answer_tvalid;
    out->answer_last = core.m_axis_answer_tlast;
    std::memcpy(out->answer, &core.m_axis_answer_tdata[0], kBeatBytes);
    out->write_address_ready = core.s_axi_awready;
    out->write_ready = core.s_axi_wready;
    out->response_valid = core.s_axi_bvalid;
    out->response = core.s_axi_bresp;
    out->read_address_ready = core.s_axi_arready;
    out->read_data_valid = core.s_axi_rvalid;
    out->read_data = core.s_axi_rdata;
    out->read_response = core.s_axi_rresp;
    out->status = core.status;
    tick(it);
}

// AXI4-Lite: the response (0: okay), and the value of a read.
int kvfs_core_read(Core *it, uint8_t address, uint32_t *value) {
    Vcore &core = it->core;
    core.s_axi_araddr = address;
    core.s_axi_arvalid = core.s_axi_rready = 1;
    core.eval();
    while (!core.s_axi_arready) tick(it);
    tick(it);
    core.s_axi_arvalid = 0;
    core.eval();
    while (!core.s_axi_rvalid) tick(it);
    *value = core.s_axi_rdata;
    int response = core.s_axi_rresp;
    tick(it);
    core.s_axi_rready = 0;
    return response;
}

int kvfs_core_write(Core *it, uint8_t address, uint32_t value) {
    Vcore &core = it->core;
    core.s_axi_awaddr = address;
    core.s_axi_wdata = value;
    core.s_axi_wstrb = 15;
    core.s_axi_awvalid = core.s_axi_wvalid = core.s_axi_bready = 1;
    core.eval();
    while (!(core.s_axi_awready && core.s_axi_wready)) tick(it);
    tick(it);
    core.s_axi_awvalid = core.s_axi_wvalid = 0;
    core.eval();
    while (!core.s_axi_bvalid) tick(it);
    int response = core.s_axi_bresp;
    tick(it);
    core.s_axi_bready = 0;
    tick(it);
    return response;
}

// Compute one unit. command: beats; blocks: 128 + mask bits each, as the stream has them, in block_bytes; keys,
// values: an address and a number of tokens each, of key_beats and value_beats; answer: room for num_answers beats.
// Returns the status, or -1 if it took more than max_cycles. cycles: how many it took.
int kvfs_core_run(Core *it, const uint8_t *command, uint64_t num_command, const uint32_t *blocks, uint64_t num_blocks,
                  const uint64_t *keys, const uint64_t *values, const uint32_t *tokens, uint64_t key_beats,
                  uint64_t value_beats, uint8_t *answer, uint64_t num_answers, uint64_t max_cycles, uint64_t *cycles) {
    Vcore &core = it->core;
    Pages key{keys, tokens, num_blocks, key_beats}, value{values, tokens, num_blocks, value_beats};
    uint64_t commands = 0, block = 0, answers = 0, now = 0;
    const int block_words = KVFS_BLOCK_BITS / 32;
    int status = -1;
    bool holds[5] = {};  // a beat that is valid stays so until it is taken
    for (; now < max_cycles && status < 0; now++) {
        bool offers[4] = {commands < num_command, block < num_blocks, !key.ended(), !value.ended()};
        for (int n = 0; n < 4; n++) holds[n] = offers[n] && (holds[n] || !it->random.hits(it->stall));
        core.s_axis_command_tvalid = holds[0];
        core.s_axis_blocks_tvalid = holds[1];
        core.s_axis_keys_tvalid = holds[2];
        core.s_axis_values_tvalid = holds[3];
        if (holds[0]) std::memcpy(&core.s_axis_command_tdata[0], command + commands * kBeatBytes, kBeatBytes);
        core.s_axis_command_tlast = commands + 1 == num_command;
        if (holds[1]) std::memcpy(&core.s_axis_blocks_tdata[0], blocks + block * block_words, KVFS_BLOCK_BITS / 8);
        if (holds[2]) {
            std::memcpy(&core.s_axis_keys_tdata[0], key.now(), kBeatBytes);
            core.s_axis_keys_tlast = key.is_last();
        }
        if (holds[3]) {
            std::memcpy(&core.s_axis_values_tdata[0], value.now(), kBeatBytes);
            core.s_axis_values_tlast = value.is_last();
        }
        core.m_axis_answer_tready = !it->random.hits(it->stall);
        core.eval();
        bool takes[4] = {holds[0] && core.s_axis_command_tready, holds[1] && core.s_axis_blocks_tready, holds[2] && core.s_axis_keys_tready,
                         holds[3] && core.s_axis_values_tready};
        if (core.m_axis_answer_tvalid && core.m_axis_answer_tready) {
            bool last = core.m_axis_answer_tlast;
            if (answers < num_answers) std::memcpy(answer + answers * kBeatBytes, &core.m_axis_answer_tdata[0], kBeatBytes);
            answers += 1;
            if (last) status = core.status;
        }
        if (core.status & KVFS_FAILED) status = core.status;
        tick(it);
        commands += takes[0];
        block += takes[1];
        if (takes[2]) key.advance();
        if (takes[3]) value.advance();
        for (int n = 0; n < 4; n++) holds[n] = holds[n] && !takes[n];
    }
    core.s_axis_command_tvalid = core.s_axis_blocks_tvalid = core.s_axis_keys_tvalid = core.s_axis_values_tvalid = 0;
    core.m_axis_answer_tready = 0;
    *cycles = now;
    return status;
}
}
