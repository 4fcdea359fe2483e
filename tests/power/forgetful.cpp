// Preloaded into a process: what it has fsynced below $FORGETFUL_ROOT is copied to $FORGETFUL_KEPT, as a disk keeps it.
// A file's content is kept by its inode; a folder's, as a list of names and inodes. `disk.py` puts them together again.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <string>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

bool is_below_root(int descriptor) {
    char link[64], path[4096];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const char *root = std::getenv("FORGETFUL_ROOT");
    const ssize_t length = readlink(link, path, sizeof path - 1);
    return root && length > 0 && std::strncmp(path, root, std::strlen(root)) == 0;
}

std::string kept_as(ino_t inode) {
    return std::string(std::getenv("FORGETFUL_KEPT")) + "/" + std::to_string(inode);
}

void keep_file(int descriptor, const struct stat &facts) {
    const std::string name = kept_as(facts.st_ino), aside = name + "." + std::to_string(getpid());
    char link[64];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const int source = open(link, O_RDONLY), copy = open(aside.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
    struct stat now;
    fstat(source, &now);
    for (off_t done = 0; done < now.st_size;)
        if (sendfile(copy, source, &done, now.st_size - done) <= 0) break;
    close(source);
    close(copy);
    rename(aside.c_str(), name.c_str());
}

void keep_folder(int descriptor, const struct stat &facts) {
    const std::string name = kept_as(facts.st_ino) + ".names", aside = name + "." + std::to_string(getpid());
    FILE *list = std::fopen(aside.c_str(), "w");
    DIR *folder = fdopendir(openat(descriptor, ".", O_RDONLY));
    while (const dirent *entry = readdir(folder))
        if (std::strcmp(entry->d_name, ".") && std::strcmp(entry->d_name, ".."))
            std::fprintf(list, "%llu %s\n", static_cast<unsigned long long>(entry->d_ino), entry->d_name);
    closedir(folder);
    std::fclose(list);
    rename(aside.c_str(), name.c_str());
}

int kept(int descriptor, const char *call) {
    struct stat facts;
    if (is_below_root(descriptor) && fstat(descriptor, &facts) == 0) {
        if (S_ISREG(facts.st_mode)) keep_file(descriptor, facts);
        if (S_ISDIR(facts.st_mode)) keep_folder(descriptor, facts);
    }
    return reinterpret_cast<int (*)(int)>(dlsym(RTLD_NEXT, call))(descriptor);
}

}  // namespace

extern "C" int fsync(int descriptor) { return kept(descriptor, "fsync"); }
extern "C" int fdatasync(int descriptor) { return kept(descriptor, "fdatasync"); }
