/* SPDX-License-Identifier: MIT */
/*
 * What Python may call, for cffi; the compiler checks it against the headers
 * of csrc/, where each thing is described.
 */

/* ---- core ---- */

#define BSU_ARENA_PORTION ...

#define BSU_OP_READ ...
#define BSU_OP_WRITE ...
#define BSU_OP_FLUSH ...
#define BSU_OP_DISCARD ...
#define BSU_OP_WRITE_ZEROES ...
#define BSU_FUA ...
#define BSU_NOUNMAP ...
#define BSU_IMAGE_ACTIVE ...
#define BSU_IMAGE_OVERFLOWN ...
#define BSU_IMAGE_CORRUPTED ...
#define BSU_IMAGE_GONE ...

struct bsu_arena;
struct bsu_device;
struct bsu_file;
struct bsu_image;
struct bsu_storage;
struct bsu_sweep;

struct bsu_arena *bsu_arena_new(void);
void bsu_arena_free(struct bsu_arena *arena);
int bsu_arena_add(struct bsu_arena *arena, void *memory);
int bsu_arena_adopt(struct bsu_arena *arena, void *memory);
size_t bsu_arena_free_bytes(const struct bsu_arena *arena);
size_t bsu_arena_bytes(const struct bsu_arena *arena);

struct bsu_storage_config {
	uint32_t unit;
	uint64_t number;
	void *state;
	bool adopt;
};
struct bsu_storage *bsu_storage_new(const struct bsu_storage_config *config, int *err);
void bsu_storage_free(struct bsu_storage *storage);
int bsu_storage_add_area(struct bsu_storage *storage, struct bsu_file *file, uint64_t offset, uint64_t length, void *records);
size_t bsu_storage_state_bytes(void);
size_t bsu_storage_records_bytes(const struct bsu_storage *storage, uint64_t length);
int bsu_storage_end_quarantine(struct bsu_storage *storage);
uint64_t bsu_storage_capacity(const struct bsu_storage *storage);
uint64_t bsu_storage_used(const struct bsu_storage *storage);
void bsu_storage_set_room(struct bsu_storage *storage, uint64_t wait_ns, uint64_t low);
void bsu_storage_set_rate(struct bsu_storage *storage, uint64_t bytes_per_s);
uint64_t bsu_storage_area_used(const struct bsu_storage *storage, unsigned int area);

struct bsu_device_config {
	uint64_t size;
	uint32_t block;
	uint32_t unit;
	uint32_t tracking_block;
	struct bsu_file *origin;
	void *bitmap;
	void *swallowed;
	uint64_t copy_limit_ns;
};
struct bsu_device *bsu_device_new(const struct bsu_device_config *config, int *err);
int bsu_device_free(struct bsu_device *dev);
void bsu_gate_close(struct bsu_device *dev);
bool bsu_gate_drained(struct bsu_device *dev);
void bsu_gate_open(struct bsu_device *dev);
int bsu_prepare_take(struct bsu_device *dev, struct bsu_image *image);
int bsu_prepare_drop(struct bsu_device *dev, struct bsu_image *image);
void bsu_prepare_cancel(struct bsu_device *dev);
bool bsu_drop_begin(struct bsu_device *dev);
void bsu_switch(struct bsu_device *dev, void *bitmap);
int bsu_settle(struct bsu_device *dev);
int bsu_device_mark(struct bsu_device *dev, uint64_t start, uint64_t length);
void bsu_device_forget_swallowed(struct bsu_device *dev, uint64_t start, uint64_t length);
int bsu_device_resize(struct bsu_device *dev, uint64_t size, void *bitmap, void *swallowed);
bool bsu_device_waits_for_room(struct bsu_device *dev);
bool bsu_device_next_swallowed(struct bsu_device *dev, uint64_t max_length, uint64_t *start, uint64_t *length);

enum bsu_image_status { ... };
struct bsu_image_config {
	struct bsu_device *device;
	struct bsu_storage *storage;
	struct bsu_arena *arena;
	void *state;
	uint32_t serial;
};
size_t bsu_image_state_bytes(uint64_t device_size, uint32_t unit);
struct bsu_image *bsu_image_new(const struct bsu_image_config *config, int *err);
struct bsu_image *bsu_image_adopt(const struct bsu_image_config *config, uint64_t size, void *before, void *after, int *err);
int bsu_image_exempt(struct bsu_image *image, uint64_t start, uint64_t length);
int bsu_image_free(struct bsu_image *image);
void bsu_image_break(struct bsu_image *image, enum bsu_image_status status, int error);
enum bsu_image_status bsu_image_status(const struct bsu_image *image, int *error);
uint64_t bsu_image_preserved(const struct bsu_image *image);
uint64_t bsu_image_written(const struct bsu_image *image);
int bsu_image_release(struct bsu_image *image);
bool bsu_image_idle(const struct bsu_image *image);

struct bsu_sweep *bsu_sweep_new(struct bsu_arena *arena, const uint32_t *lost, unsigned int nr_lost, int *err);
int bsu_sweep_add_storage(struct bsu_sweep *sweep, struct bsu_storage *storage);
int bsu_sweep_add_image(struct bsu_sweep *sweep, struct bsu_image *image);
int bsu_sweep_step(struct bsu_sweep *sweep);
void bsu_sweep_free(struct bsu_sweep *sweep);

struct bsu_queue_counters {
	uint64_t reads, writes, discards;
	uint64_t copies;
	uint64_t copied;
	uint64_t waits;
	uint64_t parked;
	uint64_t rereads;
};

uint32_t bsu_crc32c(uint32_t crc, const void *data, size_t length);

/* ---- io ---- */

#define BSU_UBLK_ARMED ...
#define BSU_UBLK_STOPPING ...
#define BSU_UBLK_DONE ...

struct bsu_control;
struct bsu_local;
struct bsu_py;
struct bsu_thread;
struct bsu_ublk;

struct bsu_file_info {
	uint64_t size;
	uint32_t block;
	bool is_device;
	bool direct;
};
struct bsu_file *bsu_file_new(int fd, int *err);
int bsu_file_info(const struct bsu_file *file, struct bsu_file_info *out);
void bsu_file_free(struct bsu_file *file);
void bsu_file_set_storage(struct bsu_file *file);

struct bsu_thread_config {
	int cpu;
	size_t pool_bytes;
	int lock_fd;
	unsigned int entries;
	unsigned int slots;
	bool io_flusher;
	int buffers_fd;
	uint64_t buffers_offset;
};
size_t bsu_thread_buffers_bytes(size_t pool_bytes);
struct bsu_storing;
struct bsu_storing *bsu_storing_start(struct bsu_thread *thread, const struct bsu_storage *storage, const void *buffers, size_t bytes, int *err);
int bsu_storing_result(const struct bsu_storing *storing);
int bsu_storing_free(struct bsu_storing *storing);
struct bsu_thread *bsu_thread_start(const struct bsu_thread_config *config, int *err);
int bsu_thread_stop(struct bsu_thread *thread, unsigned int timeout_ms);
int bsu_thread_add_barrier(struct bsu_thread *thread, int fd);
int bsu_thread_del_barrier(struct bsu_thread *thread, int slot);
int bsu_notify_fd(void);
void bsu_set_doorbell(int fd);

enum bsu_ublk_status { ... };
struct bsu_ublk_config {
	int char_fd;
	uint16_t queue_id;
	uint16_t depth;
	uint32_t desc_size;
	uint64_t flags;
	bool zero_copy;
	struct bsu_device *device;
	struct bsu_image *image;
	struct bsu_py *py;
};
struct bsu_ublk *bsu_ublk_start(struct bsu_thread *thread, const struct bsu_ublk_config *config, int *err);
enum bsu_ublk_status bsu_ublk_status(const struct bsu_ublk *ublk);
int bsu_ublk_finish(struct bsu_ublk *ublk, unsigned int timeout_ms);
void bsu_ublk_counters(struct bsu_ublk *ublk, struct bsu_queue_counters *out);

struct bsu_local_config {
	unsigned int depth;
	bool zero_copy;
	struct bsu_device *device;
	struct bsu_image *image;
	struct bsu_py *py;
};
struct bsu_local *bsu_local_start(struct bsu_thread *thread, const struct bsu_local_config *config, int *err);
int bsu_local_finish(struct bsu_local *local, unsigned int timeout_ms);
int bsu_local_submit(struct bsu_local *local, uint8_t op, uint8_t flags, uint64_t start, uint64_t length, void *buf);
int bsu_local_wait(struct bsu_local *local, int tag, unsigned int timeout_ms);
int bsu_local_io(struct bsu_local *local, uint8_t op, uint8_t flags, uint64_t start, uint64_t length, void *buf);
void bsu_local_counters(struct bsu_local *local, struct bsu_queue_counters *out);

struct bsu_py_request {
	uint32_t slot;
	uint8_t op;
	uint8_t flags;
	uint16_t pad;
	uint64_t start;
	uint64_t length;
};
struct bsu_py *bsu_py_new(void *memory, unsigned int slots, size_t max_bytes, int *err);
int bsu_py_free(struct bsu_py *py);
void bsu_py_close(struct bsu_py *py);
int bsu_py_event_fd(const struct bsu_py *py);
int bsu_py_take(struct bsu_py *py, struct bsu_py_request *out, unsigned int max);
int bsu_py_commit(struct bsu_py *py, const uint32_t *slots, const int32_t *results, unsigned int count);

int bsu_wait_for_room(struct bsu_device **devices, unsigned int count, unsigned int limit_ms, unsigned int *late);
int bsu_switch_all(struct bsu_device **devices, void **bitmaps, unsigned int count, unsigned int limit_ms,
		   uint32_t *commit, uint64_t *gate_ns, uint64_t *writes_ns, unsigned int *late);
int bsu_resize_within(struct bsu_device *device, uint64_t size, void *bitmap, void *swallowed, unsigned int limit_ms);
int bsu_switch_settle(struct bsu_device *device, unsigned int timeout_ms);
int bsu_image_release_within(struct bsu_image *image, unsigned int timeout_ms);
int bsu_replay_swallowed(struct bsu_thread *thread, struct bsu_device *device, struct bsu_file *origin, uint64_t slice,
			 unsigned int limit_ms);

struct bsu_control *bsu_control_open(int *err);
void bsu_control_close(struct bsu_control *control);
int bsu_control_command(struct bsu_control *control, uint32_t command, uint32_t dev_id, uint16_t queue_id,
			void *buf, uint16_t len, uint64_t data, unsigned int timeout_ms);

int bsu_lock_memory(void);
int bsu_set_io_flusher(void);
int bsu_get_io_flusher(void);

/* ---- sim ---- */

#define BSU_NEED_COPY ...

struct bsu_sim;
struct bsu_sim_held;

struct bsu_sim_io {
	uint64_t id;
	uint64_t request;
	uint64_t offset;
	uint64_t length;
	uint64_t unit;
	uint32_t units;
	uint32_t file;
	uint32_t queue;
	uint8_t op;
	uint8_t flags;
	uint8_t again;
	uint8_t pad;
};
struct bsu_sim_result {
	uint64_t id;
	int32_t res;
	uint32_t queue;
	int32_t data_error;
	uint32_t pad;
};
struct bsu_sim *bsu_sim_new(void);
void bsu_sim_free(struct bsu_sim *sim);
int bsu_sim_add_file(struct bsu_sim *sim, uint64_t bytes);
struct bsu_file *bsu_sim_file(struct bsu_sim *sim, unsigned int file);
void *bsu_sim_data(struct bsu_sim *sim, unsigned int file);
size_t bsu_pool_unstored_bytes(size_t bytes);
int bsu_sim_add_thread(struct bsu_sim *sim, size_t pool_bytes, void *unstored, void *memory);
unsigned int bsu_sim_store_unstored(const struct bsu_storage *storage, const void *unstored, const void *buffers, size_t bytes);
size_t bsu_sim_pool_used(struct bsu_sim *sim, unsigned int thread);
int bsu_sim_add_queue(struct bsu_sim *sim, unsigned int thread, struct bsu_device *device, struct bsu_image *image,
		      unsigned int depth, bool zero_copy);
int bsu_sim_del_queue(struct bsu_sim *sim, unsigned int queue);
int64_t bsu_sim_request(struct bsu_sim *sim, unsigned int queue, uint8_t op, uint8_t flags, uint64_t start,
			uint64_t length, void *data);
unsigned int bsu_sim_results(struct bsu_sim *sim, struct bsu_sim_result *out, unsigned int max);
unsigned int bsu_sim_started(struct bsu_sim *sim, struct bsu_sim_io *out, unsigned int max);
int bsu_sim_apply(struct bsu_sim *sim, uint64_t id);
int bsu_sim_complete(struct bsu_sim *sim, uint64_t id, int res);
const void *bsu_sim_memory(struct bsu_sim *sim, uint64_t id);
void bsu_sim_fail_data(struct bsu_sim *sim, int err);
bool bsu_sim_woken(struct bsu_sim *sim, unsigned int queue);
void bsu_sim_run_queue(struct bsu_sim *sim, unsigned int queue);
void bsu_sim_run(struct bsu_sim *sim);
void bsu_sim_tick(struct bsu_sim *sim, uint64_t ns);
void bsu_sim_pass(struct bsu_sim *sim, uint64_t ns);
unsigned int bsu_sim_notified(struct bsu_sim *sim);
const char *bsu_sim_violation(struct bsu_sim *sim);
uint32_t bsu_sim_slot(const struct bsu_image *image, uint64_t unit);
uint32_t bsu_sim_written_slot(const struct bsu_image *image, uint64_t unit);
bool bsu_sim_place_used(const struct bsu_storage *storage, uint32_t place);
int64_t bsu_sim_first_wrong(const struct bsu_image *image, const void *expected, uint64_t from);
struct bsu_sim_held *bsu_sim_hold_map(struct bsu_arena *arena, unsigned int leave);
unsigned int bsu_sim_give_map(struct bsu_sim_held *held, unsigned int pages);
void bsu_sim_free_held(struct bsu_sim_held *held);
void bsu_sim_kill(struct bsu_sim *sim);
void bsu_sim_kill_device(struct bsu_device *dev);
void bsu_sim_kill_image(struct bsu_image *image);
struct bsu_sim_region {
	void *memory;
	size_t bytes;
};

int bsu_sim_exit_at_change(const struct bsu_sim_region *memory, unsigned int count, uint64_t number, int status);
void bsu_sim_lock_map(struct bsu_image *image);
void bsu_sim_unlock_map(struct bsu_image *image);
void bsu_sim_unpublish(struct bsu_image *image, bool written, uint64_t unit, uint32_t slot);
int bsu_sim_set_mutant(int mutant);
