/* What is mapped where in a region, and the calls that map. */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "../../kmod/mshare_uapi.h"
#include "storm.h"

#define DISK "/mnt/disk/storm/"
#define TMPFS "/dev/shm/storm/"

/* Slot 0 of each region. A file is the same in both regions and may be there twice. */
const struct area areas[] = {
	{ NULL, 0, OBJECT_PAGES, OWNED, 0, false },
	{ DISK "owned", 32 * MIB, OBJECT_PAGES, OWNED, 2, false },
	{ TMPFS "owned", 64 * MIB, OBJECT_PAGES, OWNED, 3, false },
	{ TMPFS "owned", 96 * MIB, OBJECT_PAGES, OWNED, 3, true },
	{ DISK "cut", 128 * MIB, 1024, CUT, 0, false },
	{ TMPFS "cut", 144 * MIB, 1024, CUT, 1, false },
	{ DISK "sparse", 160 * MIB, 4096, SPARSE, 0, false },
	{ NULL, 192 * MIB, 1024, POISONABLE, 0, false },
	{ NULL, 256 * MIB, 4096, HOLE, 0, false },
	{ NULL, SLOT - 4 * MIB, 1024, HOLE, 0, false },
};
const unsigned int n_areas = sizeof(areas) / sizeof(areas[0]);

static int open_file(const char *path, int flags)
{
	int fd = open(path, flags | O_CLOEXEC, 0600);

	if (fd < 0)
		err(2, "%s", path);
	return fd;
}

int open_region(unsigned int region, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/fs/mshare/storm-%u", region);
	return open_file(path, flags);
}

/* Of each region two, on disk and on tmpfs: a cell of a file is at its own offset in it. */
int open_cell_file(unsigned int region, unsigned int file)
{
	char path[64];

	snprintf(path, sizeof(path), "%scells-%u", file ? TMPFS : DISK, region);
	return open_file(path, O_RDWR | O_CREAT);
}

int create_mapping(int fd, unsigned long offset, unsigned long size, int file, unsigned long from,
		   bool writable)
{
	struct mshare_create request = {
		.region_offset = offset,
		.size = size,
		.offset = from,
		.prot = PROT_READ | (writable ? PROT_WRITE : 0),
		.flags = MAP_SHARED | MAP_FIXED | (file < 0 ? MAP_ANONYMOUS | MAP_NORESERVE : 0),
		.fd = file,
	};

	return ioctl(fd, MSHAREFS_CREATE_MAPPING, &request);
}

int unmap(int fd, unsigned long offset, unsigned long size)
{
	struct mshare_unmap request = { offset, size };

	return ioctl(fd, MSHAREFS_UNMAP, &request);
}

int protect(int fd, unsigned long offset, unsigned long size, bool writable)
{
	struct mshare_protect request = { offset, size, PROT_READ | (writable ? PROT_WRITE : 0), 0 };

	return ioctl(fd, MSHAREFS_PROTECT, &request);
}

/* First generation of each page: never a page of zeros. */
static void stamp_all(char *at, const struct area *area, unsigned int object)
{
	for (unsigned long page = 0; page < area->pages; page++) {
		uint64_t value = stamp(object, page, 1);

		for (unsigned long word = 0; word < PAGE; word += WORD)
			memcpy(at + area->offset + page * PAGE + word, &value, sizeof(value));
		self.ctl->intent[object][page] = self.ctl->done[object][page] = 1;
	}
}

/* What only the changer stores in cells of files; in those of memory it does so each time. */
static void make_cell_file(unsigned int region, unsigned int file)
{
	int fd = open_cell_file(region, file);

	if (posix_fallocate(fd, 0, CELLS * CELL_SIZE))
		errx(2, "no room for the files: give the lab --disk 1G");
	for (unsigned long page = 0; page < CELLS * CELL_PAGES; page += FIXED_EVERY) {
		uint64_t value = stamp(FIXED_ID + 2 + region * 2 + file, CELL_BASE / PAGE + page, 1);

		if (pwrite(fd, &value, sizeof(value), page * PAGE) != sizeof(value))
			err(2, "write");
	}
	close(fd);
}

/* For O_DIRECT, a page of each worker; written, so that a full disk does not matter. */
static void make_direct_files(void)
{
	char path[64], zeros[PAGE] = "";

	for (unsigned int worker = 0; worker < self.ctl->workers; worker++) {
		int fd;

		snprintf(path, sizeof(path), DISK "direct-%u", worker);
		fd = open_file(path, O_RDWR | O_CREAT);
		if (write(fd, zeros, PAGE) != PAGE || fsync(fd))
			err(2, "%s", path);
		close(fd);
	}
}

void set_up(void)
{
	mkdir(DISK, 0700);
	mkdir(TMPFS, 0700);
	make_direct_files();
	for (unsigned int region = 0; region < REGIONS; region++) {
		int fd = open_region(region, O_RDWR | O_CREAT | O_EXCL);
		char *at;

		if (ftruncate(fd, 2 * SLOT))
			err(2, "size of a region");
		for (const struct area *area = areas; area < areas + n_areas; area++) {
			int file = area->file ? open_file(area->file, O_RDWR | O_CREAT) : -1;

			if (area->kind == HOLE)
				continue;
			if (file >= 0 && ftruncate(file, area->pages * PAGE))
				err(2, "%s", area->file);
			if (create_mapping(fd, area->offset, area->pages * PAGE, file, 0,
					   !area->readonly))
				err(2, "mapping at %lu", area->offset);
			if (file >= 0)
				close(file);
		}
		at = mmap(NULL, SLOT, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (at == MAP_FAILED)
			err(2, "window");
		stamp_all(at, &areas[0], region);
		if (!region) {
			stamp_all(at, &areas[1], 2);
			stamp_all(at, &areas[2], 3);
		}
		munmap(at, SLOT);
		close(fd);
		make_cell_file(region, 0);
		make_cell_file(region, 1);
	}
	for (int file = 0; file < 2; file++)
		self.ctl->cut[file].pages = 1024;
	for (unsigned int cell = 0; cell < REGIONS * CELLS; cell++)
		self.ctl->cell[cell / CELLS][cell % CELLS].seq = 2;
}

/* The anonymous one is another in each region. */
unsigned int object_of(const struct area *area, unsigned int region)
{
	return area->object ? (unsigned int)area->object : region;
}

const struct area *area_at(unsigned long offset)
{
	for (const struct area *area = areas; area < areas + n_areas; area++)
		if (offset >= area->offset && offset < area->offset + area->pages * PAGE)
			return area;
	return NULL;
}
